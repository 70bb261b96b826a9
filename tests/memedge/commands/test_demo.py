"""`memedge demo`: verdicts of both kinds, the memorized first, and the picture."""

import json

from command_line import memedge
from PIL import Image


def test_demo(tmp_path):
    done = memedge("demo", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    verdicts = json.loads(done.stdout)
    memorized = [v["memorized"] for v in verdicts]
    assert memorized == sorted(memorized, reverse=True)
    assert {True, False} == set(memorized)
    with Image.open(tmp_path / "memedge-demo.png") as picture:
        assert picture.width > 600
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 1000
    assert list(tmp_path.iterdir()) == [tmp_path / "memedge-demo.png"]
