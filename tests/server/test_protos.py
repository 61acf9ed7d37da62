from dataclasses import fields

from jaxserve.request import EngineStats
from jaxserve.sampling_params import SamplingParams
from jaxserve.server import v1
from jaxserve.server.v1 import inference_pb2 as pb
from scripts.generate_protos import OUT, generate


def test_committed_stubs_are_those_of_the_protos(tmp_path):
    generated = {path.name: path.read_text() for path in generate(tmp_path)}
    committed = {path.name: path.read_text() for path in OUT.iterdir() if path.suffix in (".py", ".pyi")}
    assert v1.__file__ is not None and committed.pop("__init__.py")
    assert generated == committed


def test_sampling_fields_are_those_of_sampling_params():
    assert [f.name for f in pb.SamplingParams.DESCRIPTOR.fields] == [f.name for f in fields(SamplingParams)]


def test_every_scalar_of_the_sampling_and_of_a_request_has_presence():
    for message in (pb.SamplingParams, pb.GenerateRequest):
        without = [f.name for f in message.DESCRIPTOR.fields if not f.has_presence]
        assert all(message.DESCRIPTOR.fields_by_name[name].is_repeated for name in without)
    assert without == [], "a request has no repeated field"


def test_every_load_figure_is_one_of_engine_stats():
    assert {f.name for f in pb.EngineLoad.DESCRIPTOR.fields} <= {f.name for f in fields(EngineStats)}
