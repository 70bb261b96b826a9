"""Training pictures and captions from files; each sort of bad input in one sentence."""

import json

import numpy as np
import pytest
from audited import write_pairs
from PIL import Image

from memedge.audit.pairs import load_picture, read_pairs
from memedge.engine.errors import InputError


def test_rows_in_their_order(tmp_path):
    file = write_pairs(tmp_path, ["b", "", "a, with a comma"], ["true", "false", ""])
    found = read_pairs(tmp_path, file)
    assert [(one.name, one.caption, one.memorized) for one in found] == [
        ("0.png", "b", True),
        ("1.png", None, False),
        ("2.png", "a, with a comma", None),
    ]


def test_a_folder_alone_has_no_captions(tmp_path):
    write_pairs(tmp_path, ["b", "a"])
    assert [(one.name, one.caption, one.memorized) for one in read_pairs(tmp_path)] == [
        ("0.png", None, None),
        ("1.png", None, None),
    ]


def test_hugging_faces_image_folders(tmp_path):
    write_pairs(tmp_path, ["a"])
    lines = [json.dumps({"file_name": "0.png", "text": "words", "memorized": True})]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    (pair,) = read_pairs(tmp_path, tmp_path / "metadata.jsonl")
    assert (pair.name, pair.caption, pair.memorized) == ("0.png", "words", True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image,caption\n0.png,a\n0.png,b\n", "names '0.png' twice"),
        ("image,caption\n0.png,a\nnone.png,b\n", "1 of 2 pictures .* are not in .*'none.png'"),
        ("picture,caption\n0.png,a\n", "no column 'image' or 'file_name', only 'picture'"),
        ("image,words\n0.png,a\n", "no column 'prompt', 'caption' or 'text'"),
        ("image,caption,memorized\n0.png,a,maybe\n", "'maybe' in its column 'memorized': write true, false"),
        ("image,caption\n,a\n", "without a picture's name"),
        ("image,caption\n", "no rows"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, text, words):
    write_pairs(tmp_path, ["a"])
    (tmp_path / "captions.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        read_pairs(tmp_path, tmp_path / "captions.csv")


def test_no_columns_no_folder_no_pictures(tmp_path):
    (tmp_path / "captions.txt").write_text("a\n")
    with pytest.raises(InputError, match="has no columns"):
        read_pairs(tmp_path, tmp_path / "captions.txt")
    with pytest.raises(InputError, match="is no folder"):
        read_pairs(tmp_path / "captions.txt")
    with pytest.raises(InputError, match="holds no pictures"):
        read_pairs(tmp_path)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_modes_that_have_one_way_to_rgb(tmp_path, mode):
    values = np.random.default_rng(0).integers(0, 2, (8, 8, 3), dtype=np.uint8) * 255
    grey = Image.fromarray(values).convert("L" if mode != "RGB" else "RGB").convert(mode)
    grey.save(tmp_path / "a.png")
    picture, changed = load_picture(read_pairs(tmp_path)[0], 8)
    assert picture.shape == (8, 8, 3)
    assert changed == 0
    np.testing.assert_array_equal(picture, np.asarray(grey.convert("RGB")))


def test_other_sizes_cover_the_square_and_are_cut_about_the_centre(tmp_path):
    # Three vertical stripes: what is left of them after the cut is the middle one.
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16, 0] = wide[:, 16:, 1] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    picture, changed = load_picture(read_pairs(tmp_path)[0], 8)
    assert changed == 1
    assert (picture == (255, 0, 0)).all()
    larger, _ = load_picture(read_pairs(tmp_path)[0], 20)
    assert larger.shape == (20, 20, 3)
    assert (larger[:, 5:15] == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: Image.new("CMYK", (8, 8)).save(path, "jpeg"), "is of mode CMYK"),
        (lambda path: Image.fromarray(np.zeros((8, 8), np.uint16)).save(path), "is of mode I;16"),
        (lambda path: Image.new("RGBA", (8, 8), (0, 0, 0, 9)).save(path), "is transparent"),
        (lambda path: path.write_bytes(b"words"), "cannot be read .it is no picture, or damaged"),
        (lambda path: path.write_bytes(_cut()), "cannot be read"),
    ],
)
def test_pictures_that_cannot_be_used(tmp_path, make, words):
    make(tmp_path / "a.png")
    with pytest.raises(InputError, match=words):
        load_picture(read_pairs(tmp_path)[0], 8)


def _cut() -> bytes:
    """Half a PNG."""
    import io

    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(stream, "png")
    return stream.getvalue()[: stream.tell() // 2]
