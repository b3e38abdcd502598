"""Segmenters: losses pixel by pixel, heads layer by layer, maps at the stored size against torch's interpolation."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from gesso.config import from_dict, to_dict
from gesso.data.decode import read_picture
from gesso.data.demo import DemoConfig
from gesso.data.demo_index import demo_index
from gesso.errors import ConfigError
from gesso.models import segmenter as module
from gesso.models.backbone import BackboneConfig
from gesso.models.build import build_model
from gesso.models.class_rows import HasClassRows
from gesso.models.dropout import drop_channels
from gesso.models.segmenter import DeepLabConfig, PSPConfig, SegmenterConfig, class_map
from gesso.structures import ImageBatch, Targets, map_tensors
from tests.models.helpers import NUM_CLASSES, Watch, picture, random_batch, step


def backbone(name="test_resnet", **changes):
    return BackboneConfig(**({"name": name, "pretrained": False, "zero_init_residual": False} | changes))


CONFIGS = {
    "psp": SegmenterConfig(backbone=backbone(output_stride=8), head=PSPConfig(width=16)),
    "psp_plain": SegmenterConfig(
        backbone=backbone(output_stride=8),
        head=PSPConfig(bins=(1, 3), width=8, auxiliary=0.0, dropout=0.0, norm="group"),
        background=False,
    ),
    "deeplab": SegmenterConfig(backbone=backbone(output_stride=16, deformable_stages=(4,)), head=DeepLabConfig()),
    "aspp": SegmenterConfig(backbone=backbone(output_stride=16), head=DeepLabConfig(rates=(1, 2, 3)), background=False),
    "vit": SegmenterConfig(backbone=backbone("test_vit"), head=PSPConfig(width=16)),
}
CELL = {"psp": 8, "psp_plain": 8, "deeplab": 16, "aspp": 16, "vit": 16}
every_kind = pytest.mark.parametrize("kind", CONFIGS)


def segmenter(kind, *, classes=NUM_CLASSES, seed=0, **changes):
    """With larger weights in the scores, so that they are apart from the start."""
    torch.manual_seed(seed)
    made = build_model(dataclasses.replace(CONFIGS[kind], **changes), classes)
    for name, parameter in made.named_parameters():
        if ".scores." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def scenes(count=2, *, seed=0, height=64, width=96) -> tuple[ImageBatch, Targets]:
    """Noise on 64 x 96 pixels, of which every second picture covers a part, with random maps of all kinds of values."""
    g = torch.Generator().manual_seed(seed)
    batch, targets = random_batch(count, width, seed=seed)
    sizes = torch.tensor([[height, width], [height - 15, width - 30]])[torch.arange(count) % 2]
    coarse = torch.randint(-1, NUM_CLASSES + 2, (count, height // 8, width // 8), generator=g).to(torch.uint8)
    maps = coarse.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    batch = dataclasses.replace(batch, images=batch.images[:, :, :height].contiguous(), sizes=sizes)
    return batch, dataclasses.replace(targets, semantic=maps)


def slow_loss(logits, targets, sizes, background):
    """The sum and the count, pixel by pixel."""
    B, H, W = targets.semantic.shape
    full = F.interpolate(logits, size=(H, W), mode="bilinear", align_corners=False).log_softmax(dim=1)
    total, count = 0.0, 0
    for b in range(B):
        for y in range(int(sizes[b, 0])):
            for x in range(int(sizes[b, 1])):
                value = int(targets.semantic[b, y, x])
                if value > NUM_CLASSES or (value == 0 and not background):
                    continue
                total = total - full[b, value if background else value - 1, y, x]
                count += 1
    return total, count


@every_kind
def test_losses_equal_a_slow_version(kind):
    model, (batch, targets) = segmenter(kind).double(), scenes()
    maps = model.maps(batch)
    terms = model.losses(maps, batch, targets)
    heads = {"segmentation": (model.head, model.map_name, 1.0)}
    if kind in ("psp", "vit"):
        heads["auxiliary"] = (model.auxiliary, "C4", 0.4)
    assert terms.keys() == heads.keys()
    values = set(targets.semantic.unique().tolist())
    assert values == {0, *range(1, NUM_CLASSES + 1), NUM_CLASSES + 1, 255}
    for name, (head, level, weight) in heads.items():
        logits = head(maps[level], batch.key)
        total, count = slow_loss(logits, targets, batch.sizes, CONFIGS[kind].background)
        assert terms[name].samples == count and 0 < count < targets.semantic.numel()
        torch.testing.assert_close(terms[name].total, weight * total)
    losses = model(batch, targets)
    torch.testing.assert_close(losses["segmentation"], terms["segmentation"].total / terms["segmentation"].samples)


@every_kind
def test_losses_and_gradients(kind):
    model, (batch, targets) = segmenter(kind), scenes()
    losses, gradients = step(model, batch, targets)
    assert all(loss.dim() == 0 and loss > 0 and loss.isfinite() for loss in losses.values())
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in gradients.items():
        assert gradient.isfinite().all() and gradient.any(), name
    assert model.head.scores[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_gradients_equal_finite_differences():
    logits = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(-1, 3, (2, 7, 6))
    assert torch.autograd.gradcheck(lambda x: module._pixel_loss(x, labels), logits)


@pytest.mark.parametrize("kind", ["psp", "psp_plain", "aspp"])
def test_two_parts_of_the_global_batch_add_up_to_it(kind):
    model, (batch, targets) = segmenter(kind).double().eval(), scenes(4)
    targets.semantic[:2, :32] = 255  # the halves count differently
    for part in model.modules():
        part.training = not isinstance(part, torch.nn.modules.batchnorm._BatchNorm)
    whole = model(batch, targets, counted=True)
    model.zero_grad()
    sum(whole.losses.values()).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = dict.fromkeys(whole.losses, 0.0)
    for half in (slice(0, 2), slice(2, 4)):
        parts = [map_tensors(value, lambda t, half=half: t[half]) for value in (batch, targets)]
        losses = model(*parts, counts=whole.counts)
        sum(losses.values()).backward()
        total = {name: total[name] + loss for name, loss in losses.items()}
    torch.testing.assert_close(total, whole.losses)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], msg=name)


def test_what_does_not_count_gives_zero():
    model, (batch, targets) = segmenter("psp"), scenes()
    void = dataclasses.replace(targets, semantic=torch.full_like(targets.semantic, 255))
    losses, gradients = step(model, batch, void)
    assert all(loss == 0 for loss in losses.values()) and not any(g.any() for g in gradients.values())
    zero = dataclasses.replace(targets, semantic=torch.zeros_like(targets.semantic))
    assert segmenter("psp")(batch, zero)["segmentation"] > 0
    assert segmenter("psp_plain")(batch, zero)["segmentation"] == 0


@every_kind
def test_logits_of_inference(kind):
    model, (batch, _) = segmenter(kind).eval(), scenes()
    logits = model(batch)
    K = NUM_CLASSES + CONFIGS[kind].background
    assert logits.shape == (2, K, 64 // CELL[kind], 96 // CELL[kind])
    assert logits.dtype == torch.float32 and not logits.requires_grad
    torch.testing.assert_close(logits, model.head(model.maps(batch)[model.map_name], batch.key))
    assert model.double()(batch).dtype == torch.float32
    one = model(picture(batch, 1))
    torch.testing.assert_close(one, model(batch)[1:])
    dirty = batch.images.clone()
    dirty[1, :, 49:], dirty[1, :, :, 66:] = 200, 3
    assert torch.equal(model(dataclasses.replace(batch, images=dirty)), model(batch))


def test_the_heads_layer_by_layer():
    model, (batch, _) = segmenter("psp"), scenes()
    head, auxiliary = model.head, model.auxiliary
    C4, C5 = (torch.randn(2, model.channels[name], 8, 12) for name in ("C4", "C5"))
    assert head.layers.bins == (1, 2, 3, 6) and head.scores[0].in_channels == 16
    assert auxiliary.layers[0].out_channels == model.channels["C4"] // 4 and auxiliary.layers[0].kernel_size == (3, 3)
    for part, values in ((head, C5), (auxiliary, C4)):
        kept = drop_channels(part.layers(values), batch.key, 0.1, part.chance)
        assert (kept == 0).flatten(2).all(dim=2).any() and part.chance != (auxiliary if part is head else head).chance
        torch.testing.assert_close(part(values, batch.key), part.scores[0](kept))
    head.eval()
    torch.testing.assert_close(head(C5, batch.key), head.scores[0](head.layers(C5)))


def test_dilated_scores_are_added():
    model, values = segmenter("aspp"), torch.randn(2, 96, 4, 6)
    assert [layer.dilation for layer in model.head.scores] == [(1, 1), (2, 2), (3, 3)]
    layers = [(s.weight, s.bias, s.dilation) for s in model.head.scores]
    expected = sum(F.conv2d(values, weight, bias, padding=d, dilation=d) for weight, bias, d in layers)
    torch.testing.assert_close(model.head(values, torch.zeros(2, dtype=torch.int64)), expected)
    plain = segmenter("deeplab").head
    assert [tuple(layer.kernel_size) for layer in plain.scores] == [(1, 1)] and not list(plain.layers.parameters())


def test_defaults_are_the_papers():
    config = SegmenterConfig()
    assert (config.backbone.name, config.backbone.output_stride) == ("resnet50", 8) and config.background
    assert config.head == PSPConfig(bins=(1, 2, 3, 6), width=512, auxiliary=0.4, dropout=0.1, norm="batch")
    for config in CONFIGS.values():
        assert from_dict(SegmenterConfig, to_dict(config)) == config


@every_kind
def test_every_tensor_is_in_one_part_and_the_scores_know_their_classes(kind):
    model = segmenter(kind)
    for name in model.state_dict():
        assert sum(name.split(".")[0] in modules for modules in model.parts.values()) == 1, name
    heads = [(name, m) for name, m in model.named_modules() if isinstance(m, HasClassRows)]
    assert len(heads) == 1 + (model.auxiliary is not None)
    for name, head in heads:
        rows = head.class_rows()
        assert rows.keys() == {n for n, _ in head.named_parameters() if n.startswith("scores.")}
        for tensor, kind_of in rows.items():
            assert kind_of.length(NUM_CLASSES) == len(head.get_parameter(tensor)), name
            assert kind_of.background == CONFIGS[kind].background


@every_kind
def test_features(kind):
    model, (batch, _) = segmenter(kind).eval(), scenes()
    found = model.features(batch, model.feature_names())
    assert tuple(found) == tuple(model.backbone.channels)
    assert all(value.shape[:2] == (2, model.channels[name]) for name, value in found.items())


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("at_once", [1, 1 << 26])
def test_class_maps_at_the_stored_size(background, at_once, monkeypatch):
    """Upsample, crop and resize picture by picture; then the highest."""
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    torch.manual_seed(0)
    logits = torch.randn(7, 8, 12)
    for size, original in (((64, 96), (64, 96)), ((49, 66), (98, 132)), ((64, 43), (31, 20)), ((1, 96), (1, 130))):
        full = F.interpolate(logits[None], size=(64, 96), mode="bilinear")[:, :, : size[0], : size[1]]
        expected = F.interpolate(full, size=original, mode="bilinear")[0].argmax(dim=0) + (not background)
        found = class_map(logits, (64, 96), size, original, background=background)
        assert found.dtype == torch.uint8 and found.shape == original
        assert torch.equal(found.long(), expected) and len(found.unique()) > 4


def test_a_class_map_of_very_many_classes_and_of_ties():
    logits = torch.zeros(255, 2, 2)
    assert not class_map(logits, (8, 8), (8, 8), (5, 5)).any()
    logits[254] = 1
    assert (class_map(logits, (8, 8), (8, 8), (5, 5)) == 254).all()
    assert (class_map(logits[1:], (8, 8), (8, 8), (5, 5), background=False) == 254).all()


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if "psp" in kind else ()) for kind in CONFIGS]
)
def test_training_and_inference_in_one_graph(kind):
    torch._dynamo.reset()
    one, other = (segmenter(kind).double() for _ in range(2))
    batch, targets = scenes()
    losses, gradients = step(one, batch, targets)
    compiled = torch.compile(other, fullgraph=True, dynamic=False, backend="aot_eager")
    found = compiled(batch, targets)
    sum(found.values()).backward()
    torch.testing.assert_close(found, losses, rtol=1e-9, atol=1e-9)
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-6, atol=1e-8, msg=name)
    for (name, a), b in zip(one.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9, msg=name)
    torch.testing.assert_close(
        torch.compile(other.eval(), fullgraph=True, backend="aot_eager")(batch), one.eval()(batch)
    )


@every_kind
def test_no_wait_for_the_device(kind):
    model, (batch, targets) = segmenter(kind), scenes()
    with Watch():
        sum(model(batch, targets).values()).backward()
        model.eval()
        model(batch)
        model.features(batch, model.feature_names())


@every_kind
def test_bfloat16_autocast(kind):
    batch, targets = scenes()
    exact = segmenter(kind)(batch, targets)
    model = segmenter(kind)
    with torch.autocast("cpu", torch.bfloat16):
        losses, gradients = step(model, batch, targets)
        logits = model.eval()(batch)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact[name], rtol=0.1, atol=0.03)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())
    assert logits.dtype == torch.float32 and logits.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PSPConfig(bins=()), "head.bins"),
        (lambda: PSPConfig(width=0), "head.width"),
        (lambda: PSPConfig(auxiliary=-0.1), "head.auxiliary"),
        (lambda: PSPConfig(dropout=1.0), "head.dropout"),
        (lambda: DeepLabConfig(rates=(0, 6)), "head.rates"),
        (lambda: segmenter("deeplab", classes=255), "255 classes: the maps have 8 bits"),
        (lambda: segmenter("psp")(*random_batch()), "the ground truth has none"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> tuple[ImageBatch, Targets]:
    """Sixteen scenes of the embedded data set with their semantic maps, as one batch."""
    config = DemoConfig(images=16, side=96, objects=(1, 2), scale=(0.5, 0.6))
    index = demo_index(tmp_path_factory.mktemp("digits"), config)
    images = np.stack([read_picture(index.image_path(i)) for i in range(16)])
    maps = np.stack([np.asarray(Image.open(index.semantic_path(i))) for i in range(16)])
    batch, targets = random_batch(16, 96)
    batch = dataclasses.replace(batch, images=torch.from_numpy(images).permute(0, 3, 1, 2))
    return batch, dataclasses.replace(targets, semantic=torch.from_numpy(maps))


def share_right(model, batch, targets):
    """Of the pixels of digits, how many have their class."""
    logits = model.eval()(batch)
    found = torch.stack([class_map(one, (96, 96), (96, 96), (96, 96)) for one in logits])
    digit = (targets.semantic > 0) & (targets.semantic < 255)
    return float((found == targets.semantic)[digit].float().mean())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "steps"), [("psp", 120), ("deeplab", 60)])
def test_it_learns_the_embedded_data(kind, steps, digits):
    """After some steps the loss is a fraction, and many pixels of digits have their class; untrained, few have."""
    batch, targets = digits
    model = segmenter(kind, classes=10)
    assert share_right(model, batch, targets) < 0.2
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history = []
    for k in range(steps):
        optimizer.zero_grad()
        loss = sum(model(dataclasses.replace(batch, key=batch.key + k), targets).values())
        loss.backward()
        optimizer.step()
        schedule.step()
        history.append(loss.item())
    assert history[-1] < 0.2 * history[0]
    assert share_right(model, batch, targets) > 0.4
