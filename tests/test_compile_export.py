"torch.compile, torch.export and ONNX of a model with each loss, and saving what was trained."
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from loss_family import FAMILY, ON_COSINES, ignoring
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from largest_margins.heads import CosineLinear, MarginHead
from largest_margins.losses import (
    AdaFaceLoss,
    ArcFaceLoss,
    CombinedMarginLoss,
    CosFaceLoss,
    ElasticFaceLoss,
    GMSoftmaxLoss,
)
from largest_margins.margins import class_margin, class_sample_margins, min_sample_margin, sample_margins
from largest_margins.regularizers import zero_centroid

TARGETS = torch.tensor([0, 1, 1, 3, 2])
WEIGHT = torch.tensor([1., 2., .5, 1.])
KINDS = [row for row in FAMILY if row.name in ('CosFace', 'ArcFace', 'LDAM', 'GM per class', 'LM logsumexp', 'R_sm',
                                               'focal')]


class Model(nn.Module):
    "A body and a head with its loss: what a training step runs. Without a head that takes targets, the dense way."

    def __init__(self, loss, head=None):
        super().__init__()
        self.body, self.head, self.loss = nn.Linear(6, 3), head or CosineLinear(3, 4), loss

    def forward(self, x, targets):
        if isinstance(self.head, MarginHead): return self.head(self.body(x), targets)
        return self.loss(self.head(self.body(x)), targets)


@pytest.fixture(autouse=True)
def fresh():
    "One compiler cache for each test: it holds few versions of one function."
    torch._dynamo.reset()
    torch.manual_seed(0)


def step(model, x, targets=TARGETS, parameters=None):
    "A loss and its gradients."
    value = model(x, targets)
    return value.detach(), torch.autograd.grad(value, parameters or list(model.parameters()))


def assert_same(a, b):
    torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-5)
    for first, second in zip(a[1], b[1], strict=True): torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('row', KINDS, ids=repr)
def test_a_model_with_its_loss_compiles_in_one_graph(row):
    model, x = Model(row.make(20., range(4), weight=WEIGHT, reduction='class-mean')), torch.randn(5, 6)
    assert_same(step(torch.compile(model, fullgraph=True, backend='aot_eager'), x, parameters=list(model.parameters())),
                step(model, x))


def test_one_graph_serves_every_batch_size():
    "The last batch is smaller: no second compilation for it."
    model = Model(ArcFaceLoss(20., weight=WEIGHT, reduction='class-mean'))
    counter = CompileCounterWithBackend('aot_eager_decomp_partition')
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for n in (5, 3, 4):
        x, targets = torch.randn(n, 6), TARGETS[:n].clone()
        assert_same(step(compiled, x, targets, list(model.parameters())), step(model, x, targets))
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


@pytest.mark.parametrize('row', KINDS[2:5], ids=repr)
def test_a_compiled_loss_takes_what_an_eager_head_returns(row):
    model, x = Model(row.make(20., range(4))), torch.randn(5, 6)
    expected = step(model, x)
    parameters = list(model.parameters())
    model.loss.compile(fullgraph=True, backend='aot_eager')
    assert_same(step(model, x, parameters=parameters), expected)


@pytest.mark.parametrize('row', ON_COSINES, ids=repr)
def test_a_head_with_targets_compiles(row):
    "In one graph, with weights and a sample that does not count."
    loss = row.make(20., range(4), weight=WEIGHT, reduction='class-mean')
    model, x = Model(None, MarginHead(3, 4, loss)), torch.randn(5, 6)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    assert_same(step(compiled, x, ignoring(TARGETS), list(model.parameters())), step(model, x, ignoring(TARGETS)))


def test_running_statistics_move_in_a_graph():
    eager, x = MarginHead(3, 4, AdaFaceLoss(8.)), torch.randn(5, 3)
    compiled = MarginHead(3, 4, AdaFaceLoss(8.))
    compiled.load_state_dict(eager.state_dict())
    value = torch.compile(compiled, fullgraph=True, backend='aot_eager')(x, TARGETS)
    torch.testing.assert_close(value, eager(x, TARGETS))
    torch.testing.assert_close(compiled.loss.norm_mean, eager.loss.norm_mean)
    assert eager.loss.norm_mean != 20


@pytest.mark.parametrize('loss, name', [(CosFaceLoss(8.), 'margin'), (GMSoftmaxLoss(8.), 'alpha2'),
                                        (CombinedMarginLoss(8.), 'm1')], ids=repr)
def test_numbers_for_each_sample_in_a_compiled_function(loss, name):
    "Which has the loss from around it, so that the compiler guards what it reads of the class."
    batch, numbers = (torch.randn(5, 3), torch.randn(4, 3), torch.arange(5) % 4), 1 + torch.rand(5)
    def of(z, w, y, numbers): return loss.linear(z, w, y, **{name: numbers})
    compiled = torch.compile(of, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(*batch, numbers), of(*batch, numbers))


def test_random_margins_in_a_compiled_model_are_drawn_by_its_generator():
    x, values = torch.randn(5, 3), []
    head = MarginHead(3, 4, ElasticFaceLoss(8., generator=torch.Generator()))
    for model in (head, torch.compile(head, backend='aot_eager')):
        head.loss.generator.manual_seed(3)
        values.append([model(x, TARGETS).item() for _ in range(2)])
    assert values[1] == pytest.approx(values[0], rel=1e-5) and values[0][0] != values[0][1]


def test_a_compiled_model_has_the_gradient_at_tiny_angles():
    "Where the float32 cosine is 1 the angle is known from the features, in a graph as well."
    head = MarginHead(3, 4, ArcFaceLoss(8.)).fix(torch.eye(4, 3) + torch.eye(4, 3).flip(0))
    model = Model(None, head)
    with torch.no_grad():
        model.body.weight.zero_()
        model.body.bias.copy_(head.weight[0] + torch.tensor([0, 1e-4, 0]))
    assert head(model.body(torch.zeros(1, 6)))[0, 0] > 1 - 1e-7
    eager = step(model, torch.zeros(1, 6), TARGETS[:1])
    compiled = step(torch.compile(model, fullgraph=True, backend='aot_eager'), torch.zeros(1, 6), TARGETS[:1],
                    list(model.parameters()))
    assert eager[1][1].norm() > 1e-6
    torch.testing.assert_close(compiled[1][1], eager[1][1], rtol=1e-3, atol=0)  # float32 chords of 1e-4 rad


@pytest.mark.parametrize('row', KINDS, ids=repr)
def test_a_model_with_its_loss_exports(row):
    model = Model(row.make(20., range(4), weight=WEIGHT, reduction='class-mean'))
    x, rows = torch.randn(5, 6), torch.export.Dim('rows', min=2, max=64)
    program = torch.export.export(model, (x, TARGETS), dynamic_shapes=({0: rows}, {0: rows}))
    torch.testing.assert_close(program.module()(x, TARGETS), model(x, TARGETS))
    torch.testing.assert_close(program.module()(x[:3], TARGETS[:3]), model(x[:3], TARGETS[:3]))


@pytest.mark.parametrize('fixed', [False, True])
def test_the_model_that_predicts_exports(fixed, tmp_path):
    head = CosineLinear(3, 4)
    model, x = nn.Sequential(nn.Linear(6, 3), head.fix(torch.randn(4, 3)) if fixed else head), torch.randn(5, 6)
    program = torch.export.export(model, (x,))
    torch.export.save(program, tmp_path/'model.pt2')
    torch.testing.assert_close(torch.export.load(tmp_path/'model.pt2').module()(x), model(x))


def test_gm_with_numbers_for_each_sample_compiles():
    loss, alpha = GMSoftmaxLoss(20.), torch.rand(5)
    cosines = CosineLinear(3, 4)(torch.randn(5, 3))
    compiled = torch.compile(loss, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(cosines, TARGETS, alpha1=alpha), loss(cosines, TARGETS, alpha1=alpha))


def test_margins_and_the_centroid_compile():
    prototypes, cosines = torch.randn(4, 3), CosineLinear(3, 4)(torch.randn(5, 3))
    for margin in (class_margin, zero_centroid):
        compiled = torch.compile(margin, fullgraph=True, backend='aot_eager')
        torch.testing.assert_close(compiled(prototypes), margin(prototypes))
    for margin in (sample_margins, class_sample_margins, min_sample_margin):
        compiled = torch.compile(margin, fullgraph=True, backend='aot_eager')
        torch.testing.assert_close(compiled(cosines, TARGETS), margin(cosines, TARGETS))


@pytest.mark.parametrize('row', FAMILY, ids=repr)
def test_a_checkpoint_brings_model_and_loss_back(row, tmp_path):
    model, x = Model(row.make(20., range(4), weight=WEIGHT)), torch.randn(5, 6)
    torch.save(model.state_dict(), tmp_path/'model.pth')
    other = Model(row.make(20., range(4), weight=WEIGHT))
    other.load_state_dict(torch.load(tmp_path/'model.pth', weights_only=True))
    assert torch.equal(other(x, TARGETS), model(x, TARGETS))


def dtypes(program):
    "All dtypes of tensors in an exported graph."
    values = [node.meta.get('val') for node in program.graph.nodes]
    return {v.dtype for v in values if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize('head', [CosineLinear(3, 4), MarginHead(3, 4, ArcFaceLoss()),
                                  CosineLinear(3, 4).fix(torch.eye(4, 3) + 1)],
                         ids=['CosineLinear', 'MarginHead', 'fixed'])
def test_the_exported_graph_holds_no_double(head):
    "Neither the model that predicts, nor the one that returns the loss."
    model, x = nn.Sequential(nn.Linear(6, 3), head), torch.randn(5, 6)
    program = torch.export.export(model, (x,))
    assert torch.float64 not in dtypes(program) and torch.float32 in dtypes(program)
    torch.testing.assert_close(program.module()(x), model(x))
    if not isinstance(head, MarginHead): return
    program = torch.export.export(Model(None, head), (x, TARGETS))
    assert torch.float64 not in dtypes(program)


# --- ONNX: a real file, run by another program ---

class Nearest(nn.Module):
    "What a recogniser with many classes returns: the nearest ones."

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, features): return self.head.top(features, 2)


MODELS = {'CosineLinear': lambda: CosineLinear(16, 4), 'MarginHead': lambda: MarginHead(16, 4, ArcFaceLoss()),
          'fixed': lambda: CosineLinear(16, 4).fix(torch.eye(4, 16) + 1),
          'top': lambda: Nearest(MarginHead(16, 40, CosFaceLoss()))}


@pytest.mark.parametrize('name', MODELS)
def test_onnx(name, tmp_path):
    "Any batch size, the same numbers, and no double anywhere."
    model = nn.Sequential(nn.Linear(6, 16), MODELS[name]()).eval()
    program = torch.onnx.export(model, (torch.randn(5, 6),), dynamo=True, dynamic_shapes=({0: 'rows'},),
                                input_names=['images'], verbose=False)
    program.save(tmp_path/'model.onnx')
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path/'model.onnx'), strict_mode=True).graph
    known = {x.name: x.type.tensor_type.elem_type for x in [*graph.input, *graph.output, *graph.value_info]}
    known |= {x.name: x.data_type for x in graph.initializer}
    assert onnx.TensorProto.FLOAT in known.values() and onnx.TensorProto.DOUBLE not in known.values()
    assert {output for node in graph.node for output in node.output} <= set(known)
    session = onnxruntime.InferenceSession(tmp_path/'model.onnx', providers=['CPUExecutionProvider'])
    for rows in (1, 2, 64):
        images = torch.randn(rows, 6)
        with torch.no_grad(): expected = model(images)
        expected = expected if name == 'top' else (expected,)
        for got, true in zip(session.run(None, {'images': images.numpy()}), expected, strict=True):
            assert got.shape == true.shape and got.dtype == true.numpy().dtype
            assert np.abs(got - true.numpy()).max() <= (1e-6 if got.dtype == np.float32 else 0)
