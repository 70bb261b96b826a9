"""`memedge doctor`: its findings, and exit code 1 where something is broken."""

import json

from command_line import memedge, memedge_process


def states(text: str) -> dict[str, str]:
    return {finding["part"]: finding["state"] for finding in json.loads(text)}


def test_json():
    found = states(memedge("doctor", "--json", "--provider", "cpu").stdout)
    assert found["engine"] == "active"
    assert found["native core"] in ("active", "missing")


def test_without_native_core():
    done = memedge_process(
        "doctor", "--json", "--provider", "cpu", MEMEDGE_NO_CORE="1"
    )  # read when memedge is imported
    assert done.returncode == 0
    assert states(done.stdout)["native core"] == "missing"


def test_broken_engine(tmp_path):
    done = memedge("doctor", "--engine", tmp_path / "nowhere")
    assert done.returncode == 1
    assert "broken" in done.stdout
