"""Looking through graphs: every export passes, and what runtimes do beyond computing is refused before they see it."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from engines import edit_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from memedge import Detector
from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine.directory import GRADIENT, NOISE_GRADIENT, PREFIX, SCREENS, TEXT_ENCODER, UNET
from memedge.engine.engine import Engine
from memedge.engine.errors import IntegrityError
from memedge.engine.graphs import check_graph
from memedge.engine.operators import OPERATORS
from memedge.engine.protobuf import WireError, fields, varints

GRAPHS = (TEXT_ENCODER, PREFIX, UNET, GRADIENT, NOISE_GRADIENT, *SCREENS)
VALUE = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def refused(folder: Path, name: str, change, words: str) -> None:
    """Change a graph of the embedded engine, of whose weights none are in `folder`."""
    model = onnx.load(EMBEDDED_ENGINE / name, load_external_data=False)
    change(model)
    path = folder / name
    path.write_bytes(model.SerializeToString())
    with pytest.raises(IntegrityError, match=words) as caught:
        check_graph(path, sizes(EMBEDDED_ENGINE))
    message = str(caught.value)
    assert message.isprintable() and message.endswith(".") and len(message.replace(str(folder), "")) < 500


def test_there_is_a_list_for_every_graph():
    assert set(OPERATORS) == set(GRAPHS)


@pytest.mark.parametrize("name", GRAPHS)
def test_exports_pass(engine, name):
    for folder in (engine, EMBEDDED_ENGINE):
        check_graph(folder / name, sizes(folder))


def node(operator: str, domain: str = "", **attributes):
    return lambda m: m.graph.node.append(helper.make_node(operator, [], ["y"], domain=domain, **attributes))


ENDLESS = helper.make_graph([], "body", [], [VALUE])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (node("Loop", body=ENDLESS), "a graph within a node"),
        (node("If", then_branch=ENDLESS, else_branch=ENDLESS), "a graph within a node"),
        (node("Scan"), "operator 'Scan'"),
        (node("LSTM"), "operator 'LSTM'"),
        (node("RandomNormal"), "operator 'RandomNormal'"),
        (node("StringNormalizer"), "operator 'StringNormalizer'"),
        (node("SequenceAt"), "operator 'SequenceAt'"),
        (node("Add", "org.stranger"), "operator 'org.stranger::Add'"),
        (node("Add", "com.microsoft"), "operator 'com.microsoft::Add'"),
        (node("A" * 300), "longer than names"),
        (node("\x1b[31m"), r"operator '\?\[31m'"),
        (lambda m: m.opset_import.append(helper.make_opsetid("org.stranger", 1)), "domain 'org.stranger'"),
        # OpenVINO looks for an operator in each version up to the one that is named.
        (lambda m: setattr(m.opset_import[0], "version", 1 << 40), "of version 1099511627776"),
        (lambda m: setattr(m.opset_import[1], "version", 2), "of version 2"),
        (lambda m: m.opset_import[0].ClearField("version"), "of version None"),
        (node("Split", num_outputs=1 << 40), "an attribute beyond ±65536"),
        (node("Transpose", perm=[0, -(1 << 40)]), "an attribute beyond ±65536"),
        (lambda m: m.functions.append(helper.make_function("own", "f", [], [], [], [])), "file with field 25"),
        (lambda m: m.training_info.add(), "file with field 20"),
        (lambda m: m.graph.sparse_initializer.add(), "graph with field 15"),
        (lambda m: m.graph.ClearField("name") or m.ClearField("graph"), "no graphs"),
    ],
)
def test_operators(tmp_path, change, words):
    refused(tmp_path, UNET, change, words)


@pytest.mark.parametrize("name", [TEXT_ENCODER, PREFIX, GRADIENT, NOISE_GRADIENT])
def test_an_operator_of_another_graph(tmp_path, name):
    """What int8 UNets hold is no other graph's."""
    change = node("DynamicQuantizeMatMul", "com.microsoft")
    refused(tmp_path, name, change, "com.microsoft::DynamicQuantizeMatMul")


def tensor(**entries: str) -> TensorProto:
    """Return float32 [4] whose data lie where the entries say."""
    found = numpy_helper.from_array(np.zeros(4, np.float32), "weight")
    found.ClearField("raw_data")
    found.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        found.external_data.add(key=key, value=value)
    return found


def changed(found: TensorProto, **values) -> TensorProto:
    for name, value in values.items():
        setattr(found, name, value)
    return found


def twice() -> TensorProto:
    found = tensor(location="unet.onnx.data")
    found.external_data.add(key="location", value="/etc/passwd")
    return found


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (tensor(location="*/_ORT_MEM_ADDR_/*", offset="8", length="16"), "does not list"),
        (tensor(location="/etc/hostname"), "reads '/etc/hostname', which the manifest does not list"),
        (tensor(location="../secret"), "does not list"),
        (tensor(location="./unet.onnx.data"), "does not list"),
        (tensor(location="unlisted"), "reads 'unlisted', which the manifest does not list"),
        (tensor(), "does not list"),
        (tensor(location="unet.onnx.data", offset=str(1 << 50)), "are not there"),
        (tensor(location="unet.onnx.data", length="8"), "reads 8 bytes"),
        (tensor(location="unet.onnx.data", offset="-1"), "number '-1'"),
        (tensor(location="unet.onnx.data", offset="²"), "number '²'"),
        (tensor(location="unet.onnx.data", checksum="x"), "with 'checksum'"),
        (twice(), "with 'location'"),
        (changed(tensor(location="unet.onnx.data"), raw_data=bytes(16)), "both in it and elsewhere"),
        (changed(tensor(location="unet.onnx.data"), data_location=0), "both in it and elsewhere"),
        (TensorProto(name="weight", data_type=TensorProto.STRING), "data type"),
        (numpy_helper.from_array(np.array(["a"]), "weight"), "tensor with field 6"),
        (changed(helper.make_tensor("weight", TensorProto.FLOAT, [4], bytes(16), raw=True), raw_data=b"1"), "16 bytes"),
        (TensorProto(name="weight", data_type=1, dims=[1 << 40, 1 << 20]), "more than there can be"),
        (TensorProto(name="weight", data_type=1, dims=[4] * 9), "more than 8 dimensions"),
        (TensorProto(name="weight", data_type=1, dims=[-1]), "more than there can be"),
    ],
)
def test_weights(tmp_path, weight, words):
    (tmp_path / "unlisted").write_bytes(bytes(16))
    refused(tmp_path, UNET, lambda m: m.graph.initializer.append(weight), words)


def test_weights_in_an_attribute(tmp_path):
    refused(tmp_path, UNET, node("Constant", value=tensor(location="unet.onnx.data")), "where none should")


@pytest.mark.parametrize("provider", ["cpu", "openvino"])
def test_no_provider_sees_what_is_refused(copy, provider):
    edit_manifest(copy, lambda m: m["files"].pop("unet.onnx.data"))
    with pytest.raises(IntegrityError, match=r"reads 'unet\.onnx\.data', which the manifest does not list"):
        Detector.load(copy, provider=provider)


@pytest.mark.parametrize("name", [PREFIX, NOISE_GRADIENT])
def test_graphs_that_are_not_listed_are_not_loaded(copy, name):
    edit_manifest(copy, lambda m: m["files"].pop(name))
    backend = Engine.open(copy, "cpu", None, 1).backend
    with pytest.raises(IntegrityError, match=f"does not list {name}"):
        backend.run_graph(name, {}, ())


@pytest.mark.parametrize("content", [b"", b"\x3a", b"\x3a\x7f", b"\x0b", b"\xff" * 12, b"\x08" + b"\x80" * 11])
def test_no_protobuf(tmp_path, content):
    path = tmp_path / UNET
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"not an ONNX file|is empty|holds a"):
        check_graph(path, {})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_change_ends_in_a_sentence(tmp_path_factory, data):
    """Bytes of a graph changed, cut or doubled: it passes, or the error is one line."""
    content = bytearray((EMBEDDED_ENGINE / UNET).read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, len(content) - 1))
        end = data.draw(st.integers(place, min(len(content), place + 9)))
        content[place:end] = data.draw(st.binary(max_size=9))
    path = tmp_path_factory.mktemp("graph") / UNET
    path.write_bytes(content)
    try:
        check_graph(path, sizes(EMBEDDED_ENGINE))
    except IntegrityError as error:
        assert str(error).isprintable() and len(str(error)) < 500
    shutil.rmtree(path.parent)


@given(st.integers(0, (1 << 64) - 1), st.binary(max_size=300))
def test_fields_are_what_protobuf_writes(number, content):
    message = TensorProto(name=content.hex(), data_type=number & 0x7FFFFFFF, raw_data=content, dims=[number >> 1])
    data = message.SerializeToString()
    found = {field: (begin, end) for field, _, begin, end in fields(data, 0, len(data))}
    begin, end = found[9] if content else (0, 0)
    assert data[begin:end] == content
    assert found.get(2, (0,))[0] == number & 0x7FFFFFFF
    assert found[1][0] == number >> 1
    packed = helper.make_attribute("axes", [number >> 1, 5]).SerializeToString()
    ints = [begin for field, _, begin, _ in fields(packed, 0, len(packed)) if field == 8]
    assert ints == [number >> 1, 5]
    with pytest.raises(WireError):
        list(fields(data + b"\x0a\x7f", 0, len(data) + 2))


def test_packed_numbers():
    assert list(varints(b"\x01\xac\x02\x00", 0, 4)) == [1, 300, 0]
    with pytest.raises(WireError):
        list(varints(b"\xac", 0, 1))
