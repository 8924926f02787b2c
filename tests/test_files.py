"Files that are whole or not there, and pickles that are read and not run."
import errno
import io
import os
import pickle
import platform
import re
import resource
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_alone

from largest_margins import files
from largest_margins.callbacks import Checkpoint, load_file, save_file
from largest_margins.files import check_output, escape, read_torch, remove_file, replace_folder, write_file
from largest_margins.inspection import write_prototypes
from largest_margins.study.experiments import Configuration, train
from largest_margins.study.glyphs import write_glyph_pairs
from largest_margins.verification import Pair, read_bin, read_pairs, write_bin, write_pairs


def python(code, *argv, **options):
    "Another process that runs this, with `write_file` at hand."
    code = f'from largest_margins.files import remove_file, replace_folder, write_file; import os, signal, sys\n{code}'
    return subprocess.run([sys.executable, '-c', code, *map(str, argv)], capture_output=True, text=True, **options)


def mode(path): return stat.S_IMODE(path.stat().st_mode)


# Writing

@pytest.mark.parametrize('content', ['text\n', b'bytes', 'αβ\r\n', '', b''])
def test_what_is_written_can_be_read(tmp_path, content):
    path = write_file(tmp_path/'a'/'b.txt', content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [p.name for p in path.parent.iterdir()] == ['b.txt']


def test_modes_and_masks(tmp_path):
    path = tmp_path/'file'
    for mask, wanted in ((0o022, 0o644), (0o077, 0o600), (0o007, 0o660)):
        before = os.umask(mask)
        try: write_file(path, 'x')
        finally: os.umask(before)
        assert mode(path) == wanted
        path.unlink()
    for wanted in (0o640, 0o600, 0o755, 0o444 if os.getuid() == 0 else 0o644):
        write_file(path, 'x')
        path.chmod(wanted)
        write_file(path, 'y')
        assert (mode(path), path.read_text()) == (wanted, 'y')


def test_links_stay_links(tmp_path):
    target, link, far = tmp_path/'real'/'file', tmp_path/'link', tmp_path/'far'
    link.symlink_to('real/file')
    far.symlink_to(link)
    for content in ('new', 'again'):  # first to where there is nothing yet
        write_file(far, content)
        assert link.is_symlink() and far.is_symlink() and target.read_text() == content
    link.unlink()
    link.symlink_to('link')
    with pytest.raises(OSError, match=r'link'): write_file(link, 'x')


@pytest.mark.parametrize('call,number', [
    ('replace', errno.EROFS), ('replace', errno.EACCES), ('replace', errno.EPERM), ('replace', errno.EBUSY),
    ('fchown', errno.EPERM)])
def test_what_can_be_written_and_not_replaced_is_overwritten(tmp_path, monkeypatch, call, number):
    "In a read-only or a sticky folder, mounted into a container, somebody else's."
    def refuse(*_): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, call, refuse)
    path = tmp_path/'file'
    path.write_text('old')
    inode = path.stat().st_ino
    write_file(path, 'new')
    assert path.read_text() == 'new' and path.stat().st_ino == inode and os.listdir(tmp_path) == ['file']


def test_attributes_such_as_access_control_lists_stay(tmp_path, monkeypatch):
    "Also where the tests run on a file system that has none."
    path, given = write_file(tmp_path/'file', 'old'), []
    monkeypatch.setattr(os, 'listxattr', lambda path: ['user.note'], raising=False)
    monkeypatch.setattr(os, 'getxattr', lambda path, name: b'x', raising=False)
    monkeypatch.setattr(os, 'setxattr', lambda file, *attribute: given.append(attribute), raising=False)
    write_file(path, 'new')
    assert path.read_text() == 'new' and given == [('user.note', b'x')]


def test_what_is_no_file_is_written_to(tmp_path):
    assert write_file('/dev/null', 'x') == Path('/dev/null') and Path('/dev/null').is_char_device()
    os.mkfifo(tmp_path/'fifo')
    found = []
    reader = threading.Thread(target=lambda: found.append((tmp_path/'fifo').read_text()))
    reader.start()
    write_file(tmp_path/'fifo', 'through')
    reader.join()
    assert found == ['through'] and stat.S_ISFIFO((tmp_path/'fifo').stat().st_mode)
    (tmp_path/'null').symlink_to('/dev/null')
    write_file(tmp_path/'null', 'x')
    assert (tmp_path/'null').is_symlink() and Path('/dev/null').is_char_device()
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))): write_file(tmp_path, 'x')
    with pytest.raises(OSError, match='No space left on device.*/dev/full'): write_file('/dev/full', 'x')


def test_open_files_are_written_where_they_stand(tmp_path):
    log = tmp_path/'log'
    for name in ('-', '/dev/stdout', '/dev/fd/1', '/proc/self/fd/1'):
        log.write_text('before ')
        with open(log, 'a') as out:
            code = 'print("and", end=" "); write_file(sys.argv[1], "this"); print(" after")'
            code = f'import sys\nfrom largest_margins.files import write_file\n{code}'
            subprocess.run([sys.executable, '-c', code, name], stdout=out, check=True)
        assert log.read_text() == 'before and this after\n'
    done = python('write_file("/dev/fd/99", "x")')
    assert done.returncode == 1 and 'OSError' in done.stderr and '/dev/fd/99' in done.stderr.splitlines()[-1]


def test_names_of_every_kind(tmp_path):
    for name in ('x' * 255, 'ä' * 127, 'a b\nc', '.hidden', '[a]*?', os.fsdecode(b'\xff\xfe')):
        write_file(tmp_path/name, 'x')
        assert (tmp_path/name).read_text() == 'x'
    assert len(list(tmp_path.iterdir())) == 6
    assert write_file(tmp_path/'text', os.fsdecode(b'\xff')).read_text() == '\\udcff'  # a name in JSON


def leave_half(path, content='x' * 3_000_000):
    "A process that is killed when half of the file is on the disk."
    done = python('''
content = b"x" * 3_000_000
def die(fd):
    os.ftruncate(fd, len(content) // 2)
    os.kill(os.getpid(), signal.SIGKILL)
os.fsync = die
write_file(sys.argv[1], content)''', path)
    assert done.returncode == -signal.SIGKILL


def test_a_killed_process_leaves_the_old_file_and_the_next_cleans_up(tmp_path):
    path = write_file(tmp_path/'file.json', 'old')
    (tmp_path/'.file.json.swp').write_text('an editor’s')
    for _ in range(2): leave_half(path)
    leave_half(tmp_path/'other')
    left = [p for p in tmp_path.iterdir() if p.name.endswith('.aside')]
    assert path.read_text() == 'old' and 2 <= len(left) <= 3
    write_file(path, 'new')
    remove_file(tmp_path/'other')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.file.json.swp', 'file.json'] and path.read_text() == 'new'


def test_nobody_sweeps_what_is_being_written(tmp_path):
    "Many writers of one file, in threads and processes: each ends well, and the file is one of theirs."
    path, many = tmp_path/'file', 'for i in range(60): write_file(sys.argv[1], sys.argv[2] * 100_000)'
    many = f'import sys\nfrom largest_margins.files import remove_file, replace_folder, write_file\n{many}'
    processes = [subprocess.Popen([sys.executable, '-c', many, path, c], stderr=subprocess.PIPE, text=True)
                 for c in 'ab']
    threads = [threading.Thread(target=lambda c=c: [write_file(path, c * 100_000) for _ in range(60)]) for c in 'cd']
    for t in threads: t.start()
    for t in threads: t.join()
    assert [p.wait() for p in processes] == [0, 0], [p.stderr.read() for p in processes]
    assert path.read_text() in {c * 100_000 for c in 'abcd'} and os.listdir(tmp_path) == ['file']


def full_disk(write, path):
    "What a writer says where no file may be larger than 1000 bytes."
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try: write(path)
    except OSError as e: print(e.errno, e.filename)


def text(path): write_file(path, 'x' * 3000)


def tensors(path): save_file(dict(x=torch.rand(999)), path)


@pytest.mark.parametrize('write', [text, tensors])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(write, tmp_path):
    path = write_file(tmp_path/'file', 'old')
    assert run_alone(full_disk, write, path) == (0, f'{errno.EFBIG} {path}\n')
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['file']


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    def stop(_): raise KeyboardInterrupt
    monkeypatch.setattr(files.os, 'fsync', stop)
    with pytest.raises(KeyboardInterrupt): write_file(tmp_path/'file', 'x')
    assert not os.listdir(tmp_path)


def test_outputs_are_checked_before_the_work(tmp_path):
    source = write_file(tmp_path/'a', 'x')
    (tmp_path/'link').symlink_to('a')
    os.link(source, tmp_path/'hard')
    for name in ('a', 'link', 'hard'):
        with pytest.raises(ValueError, match='is read'): check_output(tmp_path/name, source)
    for name, error in (('', IsADirectoryError), ('a/b', NotADirectoryError), ('a/b/c', NotADirectoryError),
                        ('new/', IsADirectoryError)):
        with pytest.raises(error): check_output(f'{tmp_path}/{name}')
    with pytest.raises(ValueError, match='empty'): check_output('')
    for name in (tmp_path/'new/new', '-', '/dev/null', '/dev/stdout', tmp_path/'hard'): check_output(name)
    with open(source, 'rb+') as file, pytest.raises(ValueError, match='is read'):
        check_output(f'/dev/fd/{file.fileno()}', source)
    with open(source, 'rb') as file, pytest.raises(OSError): check_output(f'/dev/fd/{file.fileno()}')
    (tmp_path/'loop').symlink_to('loop')
    for name in ('loop', 'loop/x'):
        with pytest.raises(OSError, match='[Ll]oop|symbolic links'): check_output(tmp_path/name)
    code = 'from largest_margins.files import check_output; import sys; check_output(sys.argv[1], "-")'
    with open(source) as file:  # the input is what stands behind the standard input
        done = subprocess.run([sys.executable, '-c', code, source], stdin=file, capture_output=True, text=True)
    assert done.returncode == 1 and 'is read' in done.stderr
    assert sorted(os.listdir(tmp_path)) == ['a', 'hard', 'link', 'loop']


def test_folders_are_whole_too(tmp_path):
    folder = tmp_path/'folder'
    for content in ('1', '2'):
        with replace_folder(folder) as new:
            write_file(new/'file', content)
            assert not folder.exists() or (folder/'file').read_text() != content
        assert (folder/'file').read_text() == content
    code = 'with replace_folder(sys.argv[1]) as new: write_file(new/"x", "x"); os.kill(os.getpid(), signal.SIGKILL)'
    assert python(code, folder).returncode == -signal.SIGKILL and len(os.listdir(tmp_path)) == 2
    with replace_folder(folder) as new: write_file(new/'file', '3')
    assert os.listdir(tmp_path) == ['folder'] and (folder/'file').read_text() == '3'


def test_every_writer_writes_so(tmp_path):
    "The new file has the mode of the old, the link stays, nothing is left beside it."
    pairs = [Pair('A/A_0001', 'A/A_0002', True), Pair('A/A_0001', 'B/B_0001', False)]
    writers = {'save_file': lambda path: save_file({'x': 1}, path),
               'pairs': lambda path: write_pairs(path, pairs, folds=1),
               'bin': lambda path: write_bin(path, [Pair(b'a', b'b', True)]),
               'p.safetensors': lambda path: write_prototypes(path, 3, 3, force=True)}
    for name, write in writers.items():
        real = write_file(tmp_path/name/'real', 'old')
        real.chmod(0o640)
        (tmp_path/name/name).symlink_to('real')
        write(tmp_path/name/name)
        assert (tmp_path/name/name).is_symlink() and real.read_bytes() != b'old' and mode(real) == 0o640
        assert sorted(os.listdir(tmp_path/name)) == sorted(['real', name])
    assert read_pairs(tmp_path/'pairs/pairs') == pairs and len(read_bin(tmp_path/'bin/bin')) == 1
    (tmp_path/'elsewhere').mkdir()
    (tmp_path/'glyphs').symlink_to('elsewhere')
    write_glyph_pairs(tmp_path/'glyphs', identities=8, folds=2, pairs=1)
    assert (tmp_path/'glyphs').is_symlink() and (tmp_path/'elsewhere/pairs.txt').exists()


def test_only_files_writes_aside():
    "Whoever wants a file to appear whole asks `write_file`."
    for path in Path(files.__file__).parent.rglob('*.py'):
        text = path.read_text(encoding='utf-8')
        if path.name == 'files.py': continue
        assert not re.search(r'os\.replace|\.write_text\(|\.write_bytes\(|torch\.load\(', text), path


# Reading

def test_what_save_file_wrote(tmp_path):
    content = {'x': torch.rand(3, 4), 'n': [1, 2.5, None, True, 'ä', (1, 2)], 'b': {'c': torch.arange(3)}, 7: 8}
    save_file(content, tmp_path/'a.pt')
    found = load_file(tmp_path/'a.pt')
    assert found['n'] == content['n'] and found[7] == 8 and torch.equal(found['b']['c'], content['b']['c'])
    found['x'] += 1  # it is ours, and the file stays
    assert torch.equal(load_file(tmp_path/'a.pt')['x'], content['x'])


@pytest.mark.parametrize('kind', ['tensors', 'checkpoint'])
def test_every_flipped_bit_is_refused_or_without_effect(tmp_path, kind):
    "Wherever it flips: another number never comes out."
    path = tmp_path/'file.pt'
    if kind == 'tensors': save_file({'x': torch.rand(9, 9), 'n': [1, 2.5, None]}, path)
    else: train(Configuration(epochs=1, embedding=4), checkpoint=path)
    whole, content = path.read_bytes(), load_file(path)
    def same(a, b):
        if isinstance(a, torch.Tensor): return a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()
        if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        if isinstance(a, list | tuple): return len(a) == len(b) and all(map(same, a, b))
        return a == b or a != a
    rng, refused = np.random.default_rng(0), 0
    for at in rng.integers(0, len(whole), 150):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        try: assert same(load_file(path), content)
        except ValueError as e: refused += str(path) in str(e)
    assert refused > 50    # the others hit padding
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match='checksum'):
        if kind == 'tensors': load_file(path)
        else: Checkpoint(path).read()


class Asks:
    def __init__(self, function, *arguments): self.asked = function, arguments
    def __reduce__(self): return self.asked


@pytest.mark.parametrize('protocol', range(6))
def test_nothing_is_run(tmp_path, protocol):
    "Whatever is named: functions of Python are refused, others become stand-ins."
    proof = tmp_path/'proof'
    import builtins
    import importlib
    import runpy
    import shutil
    code = f'open({str(proof)!r}, "w")'
    for asked in ((os.system, f'touch {proof}'), (eval, code), (exec, code), (open, str(proof), 'w'),
                  (builtins.__import__, 'this'), (importlib.import_module, 'this'),
                  (subprocess.call, ['touch', str(proof)]), (shutil.copy, sys.executable, str(proof)),
                  (runpy.run_module, 'this'), (os.mkdir, str(proof)), (pickle.loads, pickle.dumps(1)), (print, 'x')):
        for wrap in (lambda x: x, lambda x: {'fc.weight': torch.ones(2, 2), 'x': [x]}):
            (tmp_path/'file').write_bytes(pickle.dumps(wrap(Asks(*asked)), protocol))
            with pytest.raises(ValueError, match='holds .*, which is no tensor and could be code, and was not opened'):
                read_torch(tmp_path/'file')
    for asked in ((torch.hub.load, 'x/y', 'z'), (np.save, str(proof), np.ones(3)), (torch.save, {}, str(proof)),
                  (torch.load, str(proof))):
        (tmp_path/'file').write_bytes(pickle.dumps({'x': Asks(*asked)}, protocol))
        assert repr(read_torch(tmp_path/'file')['x']).startswith("StandIn('")
    assert not proof.exists()


def test_no_attribute_of_anything_can_be_set(tmp_path):
    "BUILD with a state of slots sets attributes of what is on the stack; not here."
    for target in (b'ctorch\nTensor\n', b'ctorch._utils\n_rebuild_tensor_v2\n', b'ccollections\nOrderedDict\n'):
        (tmp_path/'file').write_bytes(b'\x80\x02' + target + b'(N}X\x01\x00\x00\x00aK\x01st' + b'b.')
        read_torch(tmp_path/'file')
    assert not any(hasattr(x, 'a') for x in (torch.Tensor, torch._utils._rebuild_tensor_v2, *vars(files).values()))


def test_views_stay_within_their_storage(tmp_path):
    x = torch.arange(12.)
    for size, stride, offset in (
            ((13,), (1,), 0), ((3, 4), (4, 1), 1), ((2,), (11,), 1), ((2,), (1,), -1), ((-2,), (1,), 0),
            ((2,), (-1,), 3), ((2**62, 4), (1, 1), 0), ((2, 2), (1,), 0), ((1,) * 99, (1,) * 99, 0)):
        file = io.BytesIO()
        torch.save({'x': x}, file)
        class Asked:
            def __reduce__(self, size=size, stride=stride, offset=offset):
                return torch._utils._rebuild_tensor_v2, (x.storage(), offset, size, stride, False, {})
        torch.save({'x': Asked()}, tmp_path/'file')
        with pytest.raises(ValueError, match='impossible shape|too few numbers'): read_torch(tmp_path/'file')


def test_lazy_signs_and_conjugates_are_read(tmp_path):
    def conjugate(): return torch.randn(4, 3, dtype=torch.complex64).conj()
    saved = dict(negative=torch._neg_view(torch.rand(4, 3)), conjugate=conjugate(), part=conjugate().imag)
    torch.save(saved | dict(kind=list[int], where=platform.uname()), tmp_path/'file')
    found = read_torch(tmp_path/'file')
    assert all(torch.equal(found[name].resolve_conj(), x.resolve_conj().resolve_neg()) for name, x in saved.items())


@pytest.mark.parametrize('format,text,shown', [
    ('terminal', 'a\x1b[2J\rb\n', r'a\x1b[2J\rb\n'), ('terminal', '\u202eabc\u2028é °', r'\u202eabc\u2028é °'),
    ('html', '<b>&"\'\n', r'&lt;b&gt;&amp;&quot;&#x27;\n'), ('latex', '\\write18{x}\n%_$&#^~', None),
    ('markdown', '|<b>*x*`[a](b)\n# $y$', r'\|&lt;b>\*x\*\`\[a\](b)\\n# \$y\$'), ('plot', '$x$ \\$', r'\$x\$ \\$')])
def test_text_is_text_in_every_format(format, text, shown):
    found = escape(text, format)
    assert '\n' not in found and '\x1b' not in found
    if format == 'latex':
        shown = (r'\textbackslash{}write18\{x\}\textbackslash{}n\%\_\$\&\#\textasciicircum{}\textasciitilde{}')
    assert found == shown
    assert escape('plain text, 12.5 – α', 'terminal') == 'plain text, 12.5 – α'


def test_plots_show_class_names_as_they_are():
    import matplotlib.pyplot as plt

    from largest_margins.plots import plot_confusion, plot_prototypes
    names = ['$x_{$', '$\\frac$', '\\$', '_a', '$', 'a\nb', *'abcd']
    for ax in (plot_prototypes(torch.eye(10), names=names), plot_prototypes(torch.rand(10, 2), names=names),
               plot_prototypes(torch.rand(10, 3), names=names), plot_confusion(torch.eye(10), names=names)):
        ax.figure.savefig(io.BytesIO())
        plt.close(ax.figure)


def test_large_files_are_not_read_into_memory_twice(tmp_path):
    torch.save({'x': torch.zeros(50_000_000)}, tmp_path/'file')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_torch(tmp_path/'file')['x'].shape == (50_000_000,)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
