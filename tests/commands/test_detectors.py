"""Recipes of every kind of detector on the command line: the recipe chooses the classes, options change the numbers."""

import json

import numpy as np
import pytest
from PIL import Image

from gesso.commands.parsing import scores_text
from gesso.config import digest, from_dict, to_dict
from gesso.data.rle import decode
from gesso.evaluation.masks import pack
from gesso.recipes.catalog import find_recipe
from gesso.run.config import RunConfig
from tests.command_line import coco, picture, tree, write

OWN = '''
import dataclasses

from gesso.models.backbone import BackboneConfig
from gesso.models.cascade_rcnn import CascadeRCNNConfig
from gesso.models.faster_rcnn import FasterRCNNConfig
from gesso.models.mask_head import MaskHeadConfig
from gesso.models.retinanet import RetinaNetConfig
from gesso.models.rfcn import FineClassifierConfig, RFCNConfig
from gesso.models.semantic import SegmentationConfig
from gesso.models.simple_pyramid import SimplePyramidConfig
from gesso.models.single_level import SingleLevelConfig
from gesso.recipes.debug import tiny
from gesso.run.config import RunConfig

BACKBONE = BackboneConfig(name="test_resnet", pretrained=False)


def _run(model) -> RunConfig:
    return dataclasses.replace(tiny(), model=model)


def mask_rcnn() -> RunConfig:
    """Mask R-CNN."""
    small = dataclasses.replace(tiny().model, backbone=BACKBONE)
    return _run(dataclasses.replace(small, mask_head=MaskHeadConfig(convs=1, width=16, target_side=28)))


def cascade() -> RunConfig:
    """Cascade R-CNN with masks."""
    return _run(CascadeRCNNConfig(backbone=BACKBONE, mask_head=MaskHeadConfig()))


def retina() -> RunConfig:
    """RetinaNet."""
    return _run(RetinaNetConfig(backbone=BACKBONE))


def rfcn() -> RunConfig:
    """R-FCN-3000."""
    return _run(RFCNConfig(backbone=BACKBONE, fine=FineClassifierConfig()))


def plain() -> RunConfig:
    """The pyramid of a plain vision transformer."""
    return _run(FasterRCNNConfig(backbone=BACKBONE, neck=SimplePyramidConfig()))


def single() -> RunConfig:
    """One level, and an auxiliary loss."""
    return _run(FasterRCNNConfig(backbone=BACKBONE, neck=SingleLevelConfig(), segmentation=SegmentationConfig()))
'''
KINDS = {
    "mask_rcnn": ("FasterRCNNConfig", "FPNConfig"),
    "cascade": ("CascadeRCNNConfig", "FPNConfig"),
    "retina": ("RetinaNetConfig", "FPNConfig"),
    "rfcn": ("RFCNConfig", "SingleLevelConfig"),
    "plain": ("FasterRCNNConfig", "SimplePyramidConfig"),
    "single": ("FasterRCNNConfig", "SingleLevelConfig"),
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The name of a module of a user's own recipes, in the folder at hand."""
    module = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return module


@pytest.mark.parametrize("recipe", KINDS)
def test_the_recipe_chooses_the_classes_and_options_change_their_fields(gesso, own, recipe):
    shown = gesso.json("config", f"{own}:{recipe}", "--model.neck.width", "32")
    assert (shown["model"]["type"], shown["model"]["neck"]["type"]) == KINDS[recipe]
    assert shown["model"]["neck"]["width"] == 32
    config = find_recipe(f"{own}:{recipe}")()
    assert digest(from_dict(RunConfig, json.loads(json.dumps(to_dict(config))))) == digest(config)
    assert from_dict(RunConfig, shown).model.neck.width == 32
    text = gesso("config", f"{own}:{recipe}").out
    assert KINDS[recipe][1] in text and "model.neck.width" in text and "model.backbone.name" in text


@pytest.mark.parametrize(
    ("recipe", "option", "value", "found"),
    [
        ("mask_rcnn", "model.box-head.width", "64", 64),
        ("mask_rcnn", "model.mask-head.width", "8", 8),
        ("mask_rcnn", "model.neck.context", "psp", "psp"),
        ("cascade", "model.box-head.width", "64", 64),
        ("cascade", "model.mask-head.target-side", "56", 56),
        ("retina", "model.head.box-loss.kind", "giou", "giou"),
        ("retina", "model.head.convs", "2", 2),
        ("retina", "model.head.width", "24", 24),
        ("rfcn", "model.head.size", "3", 3),
        ("rfcn", "model.fine.width", "16", 16),
        ("single", "model.neck.rpn-level", "conv_proj", "conv_proj"),
        ("single", "model.segmentation.weight", "0.5", 0.5),
    ],
)
def test_options_of_nested_parts(gesso, own, recipe, option, value, found):
    shown = gesso.json("config", f"{own}:{recipe}", f"--{option}", value)
    for key in option.replace("-", "_").split("."):
        shown = shown[key]
    assert shown == found


def test_several_numbers_and_a_cascade(gesso, own):
    shown = gesso.json("config", f"{own}:cascade", "--model.ious", "0.5", "0.55", "0.6")
    assert shown["model"]["ious"] == [0.5, 0.55, 0.6]
    assert "Give one of each" in gesso.mistake("config", f"{own}:cascade", "--model.ious", "0.5")


@pytest.mark.parametrize(
    ("recipe", "words", "said"),
    [
        ("mask_rcnn", "--model.mask-hed.width 8", "Did you mean '--model.mask-head.width'"),
        ("mask_rcnn", "--model.nek.width 8", "Did you mean '--model.neck.width'"),
        ("retina", "--model.box-head.width 8", "unknown option '--model.box-head.width' of gesso"),
        ("retina", "--model.mask-head.width 8", "unknown option '--model.mask-head.width' of gesso"),
        ("single", "--model.neck.levels 3", "unknown option '--model.neck.levels' of gesso"),
        ("single", "--model.neck.rpn-level C6", "cannot be 'C6'. Did you mean "),
        ("mask_rcnn", "--model.neck.width x", "takes INT, found 'x'"),
        ("mask_rcnn", "--model.neck simple", "unknown option '--model.neck' of gesso"),
        ("mask_rcnn", "--model retina", "unknown option '--model' of gesso"),
        ("mask_rcnn", "model:retina-net-config", "does not take the argument 'model:retina-net-config'"),
        ("mask_rcnn", "--model.mask-head.width 0", "mask_head.width is 0. Choose a number above 0."),
    ],
)
@pytest.mark.parametrize("command", ["config", "train"])
def test_what_the_recipe_does_not_have_is_named(gesso, own, tmp_path, command, recipe, words, said):
    line = gesso.mistake(command, f"{own}:{recipe}", *words.split(), *(["--out", "run"] if command == "train" else []))
    assert said in line and not (tmp_path / "run").exists()


def test_help_shows_the_options_of_the_recipes_classes(gesso, own):
    shown = gesso("train", f"{own}:retina", "--help").out
    assert "--model.head.prior" in shown and "--model.box-head" not in shown and "--model.neck.inputs" in shown
    shown = gesso("train", f"{own}:mask_rcnn", "--help").out
    assert "--model.mask-head.width" in shown and "--model.head." not in shown


def import_two(gesso, folder):
    """An index of two pictures without masks. (No fixture: pytest closes the log's stream before the test itself.)"""
    coco(folder / "source", 2)
    gesso("data", "import", folder / "source", "--out", folder / "index")
    return folder / "index"


@pytest.mark.parametrize(
    ("recipe", "words", "said"),
    [
        ("debug:tiny", "--model.backbone.name resnet5o", "timm has no backbone 'resnet5o'. Did you mean 'resnet50'"),
        ("debug:tiny", "--model.backbone.name mixer_s32_224", "has maps at strides [32], not at 4, 8, 16 and 32"),
        ("debug:tiny", "--model.backbone.name vit_tiny_patch16_224", "SimplePyramidConfig"),
        ("{own}:single", "--model.backbone.name vit_tiny_patch16_224", "no C5"),
        ("{own}:plain", "", "a simple pyramid needs a backbone with one map"),
        (
            "{own}:mask_rcnn",
            "",
            "index: none of its 2 objects has a mask, and the detector",
        ),
        ("{own}:cascade", "", "model.mask_head"),
    ],
)
def test_what_cannot_be_trained_is_one_line_and_leaves_nothing(gesso, own, tmp_path, recipe, words, said):
    index = import_two(gesso, tmp_path)
    before = tree(tmp_path / "source") | tree(index)
    call = ["train", recipe.format(own=own), *words.split(), "--data.train", index, "--device", "cpu", "--out", "run"]
    assert said in gesso.mistake(*call)
    assert not (tmp_path / "run").exists() and tree(tmp_path / "source") | tree(index) == before


TINY = ("--training.steps", "1", "--training.batch-size", "2", "--device", "cpu")
TINY += ("--model.backbone.name", "test_resnet")


def test_what_of_another_detector_is_loaded_is_said(gesso, own, tmp_path):
    index = import_two(gesso, tmp_path)
    gesso("train", "debug:tiny", *TINY, "--data.train", index, "--out", tmp_path / "a")
    for name, recipe, words in (("b", "debug:tiny", ("--model.neck.width", "32")), ("c", f"{own}:retina", ())):
        call = ("train", recipe, *words, *TINY, "--data.train", index, "--init", tmp_path / "a")
        said = gesso(*call, "--out", tmp_path / name).err
        assert "tensors loaded" in said and "in these weights: it starts anew" in said


def test_pictures_of_16_bits_and_of_print_colours_are_trained_on(gesso, tmp_path):
    folder = tmp_path / "source"
    document = coco(folder, 4)
    names = ("16bit.png", "16bit.tif", "print.jpg", "grey.png")
    rng = np.random.default_rng(0)
    for image, name in zip(document["images"], names, strict=True):
        (folder / "images" / image["file_name"]).unlink()
        image["file_name"] = name
    deep = rng.integers(0, 2**16, (30, 40)).astype(np.uint16)
    Image.fromarray(deep).save(folder / "images" / names[0])
    Image.fromarray(deep).save(folder / "images" / names[1])
    Image.new("CMYK", (40, 30), (10, 200, 90, 0)).save(folder / "images" / names[2])
    Image.new("L", (40, 30), 90).save(folder / "images" / names[3])
    write(folder, document)
    made = gesso.json("data", "import", folder, "--out", tmp_path / "i")
    assert made["images"] == 4 and not made["issues"]
    words = ("--training.steps", "2", "--data.train", tmp_path / "i", "--data.val", tmp_path / "i")
    result = gesso.json("train", "debug:tiny", *TINY, *words, "--out", tmp_path / "run")
    assert result["images"] == 4 and result["scores"]["AP"] >= 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "cannot be read" not in log and "could not be read" not in log


def test_masks_from_training_to_prediction(gesso, own, tmp_path):
    """The whole way on the command line; the embedded data has masks."""
    words = ("--data.embedded.images", "6", "--data.embedded-val", "2")
    result = gesso.json("train", f"{own}:mask_rcnn", *TINY, *words, "--out", tmp_path / "run")
    data = tmp_path / "run" / "data" / "val"
    scores = gesso.json("evaluate", tmp_path / "run", "--data", data / "index", "--workers", "0", "--device", "cpu")
    assert {"AP", "by_class", "mask_AP", "mask_APl"} <= scores.keys() and scores["AP"] == result["scores"]["AP"]
    text = gesso("evaluate", tmp_path / "run", "--data", data / "index", "--workers", "0", "--device", "cpu").out
    assert text.splitlines()[0].split() == ["score", "boxes", "masks"]
    assert "AP of the masks" not in text and "mask_AP" not in text
    picture(tmp_path / "photos" / "wide.png", (90, 50))
    call = ("predict", tmp_path / "run", tmp_path / "photos", "--min-score", "0", "--device", "cpu")
    rows = gesso.json(*call, "--out", tmp_path / "out")
    assert rows == json.loads((tmp_path / "out" / "detections.json").read_text()) and rows
    for row in rows:
        assert row["segmentation"]["size"] == [50, 90] and isinstance(row["segmentation"]["counts"], str)
        assert decode(pack(row["segmentation"])).shape == (50, 90)
    with Image.open(tmp_path / "out" / "0001-wide.jpg") as drawn:
        assert min(drawn.size) >= 320


def test_scores_of_masks_stand_beside_those_of_boxes():
    boxes = {"AP": 0.5, "APs": -1.0, "AR1": 0.25, "by_class": {"cat": 0.5}}
    assert scores_text(boxes).split("\n\n")[0].splitlines() == [
        "score  value",
        "-----  -----",
        "AP     0.500",
        "APs        -",
        "AR1    0.250",
    ]
    assert scores_text(boxes | {"mask_AP": 0.125, "mask_APs": -1.0}).split("\n\n")[0].splitlines() == [
        "score  boxes  masks",
        "-----  -----  -----",
        "AP     0.500  0.125",
        "APs        -      -",
        "AR1    0.250      -",
    ]
