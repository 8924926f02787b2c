"A real Chromium, driven over a pipe in its own protocol, and a server that it looks at."
import json
import os
import subprocess
import threading
import time
from fcntl import F_DUPFD, fcntl
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

audit = (Path(__file__).parent/'audit.js').read_text(encoding='utf-8')


class Refused(Exception):
    "What Chromium could not do, in its words."


class Chromium:
    """One browser with one tab. `failed` is what went wrong since the last `open`: errors in the console, exceptions,
    requests to anybody but the server (`outside`), and what the server lacks (`missing`)."""

    def __init__(self, folder, profile):
        class Handler(SimpleHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def __init__(self, *args):
                super().__init__(*args, directory=folder)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.origin = f'http://127.0.0.1:{self.server.server_port}'
        # Chromium reads from 3 and writes to 4; its ends of the pipes come from where they are not in the way
        read_in, ours_out = os.pipe()
        ours_in, write_out = os.pipe()
        theirs_in, theirs_out = (fcntl(end, F_DUPFD, 20) for end in (read_in, write_out))
        self.process = subprocess.Popen([
            'bash', '-c', f'exec "$@" 3<&{theirs_in} 4>&{theirs_out} {theirs_in}<&- {theirs_out}>&-', 'bash',
            'chromium', '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run',
            '--disable-background-networking', '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1',
            # each visit is new: what was left is not kept alive beside it, which took half of the processor's time
            '--disable-features=BackForwardCache,RenderDocument', f'--user-data-dir={profile}',
            '--remote-debugging-pipe', 'about:blank'],
            pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL)
        for end in (read_in, write_out, theirs_in, theirs_out):
            os.close(end)
        self.to, self.back = os.fdopen(ours_out, 'wb', 0), os.fdopen(ours_in, 'rb')
        self.sent, self.events, self.session, self.buffer = 0, [], None, b''
        target = next(t for t in self.call('Target.getTargets')['targetInfos'] if t['type'] == 'page')
        self.session = self.call('Target.attachToTarget', targetId=target['targetId'], flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            self.call(f'{domain}.enable')

    def close(self):
        self.to.close()
        self.back.close()
        self.process.terminate()
        self.process.wait(20)
        self.server.shutdown()
        self.server.server_close()

    # --- the protocol: messages in JSON, each ended by a zero byte ---

    def send(self, method, **params):
        self.sent += 1
        session = {'sessionId': self.session} if self.session else {}
        self.to.write(json.dumps(dict(id=self.sent, method=method, params=params, **session)).encode() + b'\0')
        return self.sent

    def receive(self):
        while b'\0' not in self.buffer:
            got = self.back.read1(1 << 16)
            assert got, 'Chromium has gone'
            self.buffer += got
        message, self.buffer = self.buffer.split(b'\0', 1)
        return json.loads(message)

    def answer(self, number):
        while (message := self.receive()).get('id') != number:
            if 'method' in message:
                self.events.append(message)
        if 'error' in message:
            raise Refused(message['error']['message'])
        return message['result']

    def call(self, method, **params):
        return self.answer(self.send(method, **params))

    # --- a page ---

    def open(self, address, width=1280, height=900):
        "Loads a page and waits for its scripts, its fonts and its formulas."
        self.leave()
        self.resize(width, height)
        self.events.clear()
        self.call('Page.navigate', url=f'{self.origin}/{address}')
        self.wait_for('document.readyState == "complete"')
        self.run('window.MathJax?.startup?.promise?.then(() => document.fonts.ready).then(() => true)')
        self.run('new Promise(done => requestIdleCallback(() => done(true), {timeout: 1000}))')
        self.run(audit + '; null')

    def leave(self):
        "What moves on a page stops."
        if not self.holds('location.href == "about:blank"'):
            self.call('Page.navigate', url='about:blank')

    def resize(self, width, height):
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)

    def run(self, script):
        "The value of an expression in the page, a promise waited for."
        done = self.call('Runtime.evaluate', expression=script)
        assert 'exceptionDetails' not in done, done
        if found := done['result'].get('objectId'):   # by its name, which keeps a promise alive until it is kept
            done = self.call('Runtime.callFunctionOn', objectId=found, awaitPromise=True, returnByValue=True,
                             functionDeclaration='async function() {return this}')
            self.call('Runtime.releaseObject', objectId=found)
            assert 'exceptionDetails' not in done, done
        return done['result'].get('value')

    def wait_for(self, condition, seconds=600):
        end = time.monotonic() + seconds
        while not self.holds(f'location.href != "about:blank" && Boolean({condition})'):
            assert time.monotonic() < end, f'not within {seconds} s: {condition}'
            time.sleep(.01)

    def holds(self, condition):
        "Whether the page that is there fulfils a condition; one that is just being left does not."
        try:
            return self.run(condition)
        except Refused as refused:
            if 'navigated' not in str(refused):
                raise
            return False

    def press(self, key, times=1, **more):
        "A key that is held down until it has come `times` times."
        numbers = [self.send('Input.dispatchKeyEvent', type=kind, key=key, **more)
                   for kind in (*times * ['keyDown'], 'keyUp')]
        for number in numbers:
            self.answer(number)

    def seen(self, method):
        return [e['params'] for e in self.events if e['method'] == method]

    @property
    def outside(self):
        urls = [e['request']['url'] for e in self.seen('Network.requestWillBeSent')]
        return [u for u in urls if not u.startswith((self.origin, 'data:', 'blob:', 'about:'))]

    @property
    def missing(self):
        answers = [e['response'] for e in self.seen('Network.responseReceived')]
        return [r['url'].removeprefix(self.origin) for r in answers if r['status'] >= 400]

    @property
    def complaints(self):
        "Exceptions, and errors and warnings in the console."
        thrown = [e['exceptionDetails']['text'] for e in self.seen('Runtime.exceptionThrown')]
        bad = ('error', 'warning', 'assert')
        logged = [e['args'] for e in self.seen('Runtime.consoleAPICalled') if e['type'] in bad]
        noted = [e['entry'] for e in self.seen('Log.entryAdded') if e['entry']['level'] in bad]
        return thrown + logged + [(e['text'], e.get('url')) for e in noted]
