"""What the guards read from a module's text."""

import pytest

from tests.gpu_compile import hlo

TEXT = """HloModule jit_step, is_scheduled=true

%fused (p: bf16[8,4]) -> bf16[8,4] {
  ROOT %copy.9 = bf16[8,4]{1,0} copy(%p)
}

ENTRY %main (w.1: bf16[1,8,4], pages.1: bf16[6,5]) -> (bf16[6,5], f32[]) {
  %w.1 = bf16[1,8,4]{2,1,0} parameter(0), sharding={replicated}, metadata={op_name="params.w"}
  %bitcast.1 = bf16[8,4]{1,0} bitcast(%w.1)
  %transpose.1 = bf16[4,8]{1,0} transpose(%bitcast.1), dimensions={1,0}
  %pages.1 = bf16[6,5]{1,0} parameter(1)
  %pair = ((bf16[6,5]{1,0}), f32[]) fusion(%transpose.1, /*index=1*/%pages.1), kind=kInput, calls=%fused
  %get-tuple-element.1 = f32[] get-tuple-element(%pair), index=1
  ROOT %tuple.1 = (bf16[6,5]{1,0}, f32[]) tuple(%pages.1, %get-tuple-element.1)
}
"""


def test_entry_readers_and_what_is_made():
    instructions = hlo.entry(TEXT)
    assert [x.opcode for x in instructions] == [
        "parameter", "bitcast", "transpose", "parameter", "fusion", "get-tuple-element", "tuple",
    ]  # fmt: skip
    assert [x.name for x in hlo.readers(instructions, 0)] == ["transpose.1"]
    assert [x.name for x in hlo.readers(instructions, 1)] == ["pair"]
    assert [x.name for x in hlo.made(instructions, [8 * 4])] == ["transpose.1"]
    assert [x.name for x in hlo.made(instructions, [6 * 5])] == ["pair"]
    with pytest.raises(ValueError, match="parameter 2"):
        hlo.readers(instructions, 2)


def test_launches_are_what_is_not_inside_another():
    thunks = """000: kCommandBuffer [source | sink]
    001: kCustomKernel [source | sink] fusion grid: [1, 1, 1]
002: kAllReduce [prev=000 (1) | sink] kAllReduce
"""
    assert hlo.launches(thunks) == ["kCommandBuffer", "kAllReduce"]
