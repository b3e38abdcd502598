"""Classifiers: timm's features and a linear layer, losses picture by picture, and means over what is valid."""

import dataclasses

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.config import from_dict, to_dict
from gesso.data.decode import read_picture
from gesso.data.demo import DemoConfig, make_demo_classes
from gesso.errors import ConfigError
from gesso.models.backbone import BackboneConfig
from gesso.models.build import build_model
from gesso.models.class_rows import HasClassRows
from gesso.models.classifier import ClassifierConfig, pool_valid
from gesso.models.dropout import drop_channels
from gesso.random_key import stream
from gesso.structures import ImageBatch, Targets, map_tensors
from tests.models.helpers import NUM_CLASSES, Watch, picture, random_batch, step

NAMES = ("test_resnet", "test_vit")
every_name = pytest.mark.parametrize("name", NAMES)


def config(name="test_resnet", **changes):
    return ClassifierConfig(
        backbone=BackboneConfig(name=name, pretrained=False, zero_init_residual=False), **changes
    )  # fmt: skip


def classifier(name="test_resnet", *, classes=NUM_CLASSES, **changes):
    torch.manual_seed(0)
    model = build_model(config(name, **changes), classes)
    torch.nn.init.normal_(model.fc.weight, std=0.3)
    return model


def labelled(count=6, *, side=64, seed=0) -> tuple[ImageBatch, Targets]:
    """Noise; every picture has one class, but the second none and the last but one two."""
    batch, targets = random_batch(count, side, seed=seed)
    verified = torch.full((count, NUM_CLASSES), 2, dtype=torch.int8)
    verified[torch.arange(count), (torch.arange(count) * 2 + 1) % NUM_CLASSES] = 1
    verified[0, verified[0] == 2] = 0  # what is not verified is not present
    verified[1] = torch.tensor([0, 2, 0, 2, 2])
    verified[-2, :2] = 1
    return batch, dataclasses.replace(targets, verified=verified)


def slow_loss(model, batch, targets, smoothing=0.0):
    """The sum and the count, picture by picture, from the probabilities."""
    pooled = model.maps(batch)["pooled"]
    rates = model.config.dropout
    total, count = 0.0, 0
    for b, states in enumerate(targets.verified.tolist()):
        if states.count(1) != 1:
            continue
        wanted = torch.full((NUM_CLASSES,), smoothing / NUM_CLASSES, dtype=pooled.dtype)
        wanted[states.index(1)] += 1 - smoothing
        row = (
            drop_channels(pooled[b : b + 1], batch.key[b : b + 1], rates, stream("classifier.dropout"))
            if rates
            else pooled[b : b + 1]
        )
        scores = row @ model.fc.weight.T + model.fc.bias
        total = total - (wanted * scores[0].log_softmax(dim=0)).sum()
        count += 1
    return total, count


@every_name
def test_it_is_timms_network_with_a_linear_layer(name):
    """Where nothing is padding: the network's own pooled features, through ``nn.Linear``."""
    model, (batch, _) = classifier(name).eval(), labelled()
    reference = timm.create_model(name, num_classes=0)
    ours = {
        key.removeprefix("backbone.body.").removeprefix("model."): value for key, value in model.state_dict().items()
    }
    own = reference.state_dict()
    # In the network that gives maps the children are flattened; both stand in the order of the forward pass.
    body = [value for key, value in ours.items() if not key.startswith("fc.")]
    assert len(body) == len(own)
    reference.load_state_dict(dict(zip(own, body, strict=True)))
    images = model.normalise(batch)
    with torch.no_grad():
        if name == "test_vit":
            tokens = reference.eval().forward_features(images)
            pooled = tokens[:, reference.num_prefix_tokens :].mean(dim=1)
        else:
            pooled = reference.eval()(images)
        linear = torch.nn.Linear(pooled.shape[1], NUM_CLASSES)
        linear.load_state_dict(model.fc.state_dict())
        expected = linear(pooled)
    logits = model(batch)
    assert logits.shape == (6, NUM_CLASSES) and logits.dtype == torch.float32 and not logits.requires_grad
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@every_name
@pytest.mark.parametrize(("dropout", "smoothing"), [(0.0, 0.0), (0.4, 0.0), (0.0, 0.1)])
def test_losses_equal_a_slow_version(name, dropout, smoothing):
    model = classifier(name, dropout=dropout, label_smoothing=smoothing).double()
    batch, targets = labelled()
    terms = model.losses(model.maps(batch), batch, targets)
    total, count = slow_loss(model, batch, targets, smoothing)
    assert list(terms) == ["class"] and terms["class"].samples == count == 4
    torch.testing.assert_close(terms["class"].total, total)
    torch.testing.assert_close(model(batch, targets)["class"], total / count)
    model.eval()
    plain = model.fc(model.maps(batch)["pooled"])
    torch.testing.assert_close(model(batch), plain.float())


@every_name
def test_losses_and_gradients(name):
    model, (batch, targets) = classifier(name), labelled()
    losses, gradients = step(model, batch, targets)
    assert losses["class"] > 0 and gradients.keys() == {name for name, _ in model.named_parameters()}
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())
    none = dataclasses.replace(targets, verified=torch.zeros_like(targets.verified))
    losses, gradients = step(model, batch, none)
    assert losses["class"] == 0 and not any(gradient.any() for gradient in gradients.values())


def test_two_parts_of_the_global_batch_add_up_to_it():
    model, (batch, targets) = classifier("test_vit", dropout=0.2).double(), labelled()
    whole = model(batch, targets, counted=True)
    halves = [slice(0, 2), slice(2, 6)]  # of one and of three that count
    parts = [[map_tensors(v, lambda t, half=half: t[half]) for v in (batch, targets)] for half in halves]
    total = sum(model(*part, counts=whole.counts)["class"] for part in parts)
    torch.testing.assert_close(total, whole.losses["class"])


@every_name
def test_padding_does_not_count(name):
    model, (batch, _) = classifier(name).eval(), labelled(2, side=96)
    sizes = torch.tensor([[96, 96], [64, 32]])
    dirty = dataclasses.replace(batch, sizes=sizes)
    images = batch.images.clone()
    images[1, :, 64:], images[1, :, :, 32:] = 0, 77
    assert torch.equal(model(dirty), model(dataclasses.replace(dirty, images=images)))
    found = model.features(dirty, ["pooled", model.map_name])
    cells = [int(side / model.strides[model.map_name]) for side in (64, 32)]
    last = found[model.map_name]
    torch.testing.assert_close(found["pooled"][1], last[1, :, : cells[0], : cells[1]].mean(dim=(1, 2)))
    torch.testing.assert_close(found["pooled"][0], last[0].mean(dim=(1, 2)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 90), st.integers(1, 6), st.sampled_from([8.0, 14.0, 16.0]), st.randoms())
def test_valid_pooling_equals_a_mean_over_pixels(height, width, n, stride, random):
    """Each cell of the map drawn as stride x stride squares, and each square cut into n x n smaller ones."""
    torch.manual_seed(random.randint(0, 1000))
    h, w = -(-70 // int(stride)), -(-90 // int(stride))
    values = torch.randn(1, 3, h, w, dtype=torch.float64)
    fine = values.repeat_interleave(int(stride) * n, dim=2).repeat_interleave(int(stride) * n, dim=3)
    valid = fine[:, :, : height * n, : width * n]
    expected = F.avg_pool2d(valid, (height, width))
    assert expected.shape == (1, 3, n, n)
    found = pool_valid(values, torch.tensor([[height, width]]), stride, n)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("n", [1, 2, 7, 14])
def test_valid_pooling_of_whole_pictures_is_plain_pooling(n):
    values = torch.randn(2, 5, 14, 14)
    found = pool_valid(values.to(memory_format=torch.channels_last), torch.full((2, 2), 224), 16.0, n)
    torch.testing.assert_close(found, F.adaptive_avg_pool2d(values, n))
    with torch.autocast("cpu", torch.bfloat16):
        half = pool_valid(values.bfloat16(), torch.full((2, 2), 224), 16.0, n)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, F.adaptive_avg_pool2d(values.bfloat16().float(), n))


def test_valid_pooling_has_the_right_gradient():
    values = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([[40, 64], [17, 30]])
    assert torch.autograd.gradcheck(lambda x: pool_valid(x, sizes, 16.0, 2), values)


@every_name
def test_features_and_a_picture_by_itself(name):
    model, (batch, _) = classifier(name).double().eval(), labelled()
    names = model.feature_names()
    assert names == (*model.backbone.channels, "pooled")
    found = model.features(batch, names)
    assert found["pooled"].shape == (6, model.channels[model.map_name]) and tuple(found) == names
    alone = model.features(picture(batch, 3), names)
    for feature in names:
        torch.testing.assert_close(alone[feature][0], found[feature][3])
    torch.testing.assert_close(model(picture(batch, 3))[0], model(batch)[3])


@every_name
def test_every_tensor_is_in_one_part_and_the_scores_know_their_classes(name):
    model = classifier(name)
    for tensor in model.state_dict():
        assert sum(tensor.split(".")[0] in modules for modules in model.parts.values()) == 1, tensor
    assert isinstance(model, HasClassRows)
    for tensor, rows in model.class_rows().items():
        assert rows.length(NUM_CLASSES) == len(model.get_parameter(tensor))


@every_name
def test_training_and_inference_in_one_graph(name):
    torch._dynamo.reset()
    one, other = (classifier(name, dropout=0.2, label_smoothing=0.1).double() for _ in range(2))
    batch, targets = labelled()
    losses, gradients = step(one, batch, targets)
    found = torch.compile(other, fullgraph=True, dynamic=False, backend="aot_eager")(batch, targets)
    sum(found.values()).backward()
    torch.testing.assert_close(found, losses, rtol=1e-9, atol=1e-9)
    for tensor, parameter in other.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[tensor], rtol=1e-6, atol=1e-8, msg=tensor)
    compiled = torch.compile(other.eval(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch), one.eval()(batch))


@every_name
def test_no_wait_for_the_device(name):
    model, (batch, targets) = classifier(name, dropout=0.2), labelled()
    with Watch():
        model(batch, targets)["class"].backward()
        model.eval()
        model(batch)
        model.features(batch, model.feature_names())


@every_name
def test_bfloat16_autocast(name):
    batch, targets = labelled(side=96)
    exact = classifier(name)(batch, targets)
    model = classifier(name)
    with torch.autocast("cpu", torch.bfloat16):
        losses, gradients = step(model, batch, targets)
        logits = model.eval()(batch)
    assert losses["class"].dtype == logits.dtype == torch.float32
    torch.testing.assert_close(losses["class"], exact["class"], rtol=0.1, atol=0.03)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())


def test_configuration():
    for one in (ClassifierConfig(), config("test_vit", dropout=0.5, label_smoothing=0.1)):
        assert from_dict(ClassifierConfig, to_dict(one)) == one
    for wrong in ({"dropout": 1.0}, {"label_smoothing": -0.1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ClassifierConfig(**wrong)
    with pytest.raises(ConfigError, match="the ground truth has none"):
        classifier()(*random_batch())


@pytest.mark.slow
def test_it_learns_the_embedded_classes(tmp_path):
    """After some steps most of the pictures that it learnt from have their class first."""
    folder = make_demo_classes(tmp_path / "c", DemoConfig(images=12, objects=(3, 5)), side=64)
    paths = sorted(folder.glob("*/*.png"))
    names = sorted({path.parent.name for path in paths})
    images = np.stack([read_picture(path) for path in paths])
    batch, targets = random_batch(len(paths), 64)
    batch = dataclasses.replace(batch, images=torch.from_numpy(images).permute(0, 3, 1, 2))
    labels = torch.tensor([names.index(path.parent.name) for path in paths])
    verified = 2 - F.one_hot(labels, len(names)).to(torch.int8)
    targets = dataclasses.replace(targets, verified=verified)
    model = classifier(classes=len(names))
    assert len(paths) > 30 and (model.eval()(batch).argmax(dim=1) == labels).float().mean() < 0.4
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(batch, targets)["class"]
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.2 * history[0]
    assert (model.eval()(batch).argmax(dim=1) == labels).float().mean() > 0.8
