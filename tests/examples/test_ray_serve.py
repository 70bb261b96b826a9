"""examples/ray_serve.py in Ray Serve itself, which CI installs in an environment of its own."""

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed: python -m pip install 'ray[serve]'")

# What Ray warns of is its own.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def url():
    """Two replicas behind Ray's proxy."""
    import ray_serve
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    examples = str(Path(ray_serve.__file__).parent)
    ray.init(num_cpus=3, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": examples}})
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(ray_serve.Gatekeeper.options(num_replicas=2).bind(), name="gate")
        yield f"http://127.0.0.1:{port}/"
    finally:
        serve.shutdown()
        ray.shutdown()


def test_replicas_judge(url):
    """Over HTTP, many at once, and by handle; what is wrong is answered as such."""
    from ray import serve

    def ask(prompts: object) -> httpx.Response:
        return httpx.post(url, json={"prompts": prompts}, timeout=60, trust_env=False)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, [["the left luggage sign", f"a red bicycle {number}"] for number in range(24)]))
    assert {answer.status_code for answer in answers} == {200}
    for answer in answers:
        assert [one["memorized"] for one in answer.json()["verdicts"]] == [True, False]
    assert ask([]).status_code == 422 and "no prompts to judge" in ask([]).json()["error"]
    assert ask(7).status_code == 422
    (verdict,) = serve.get_app_handle("gate").verdicts.remote(["the left luggage sign"]).result()
    assert verdict["memorized"] is True
