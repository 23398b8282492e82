import pytest

from kto_jax.planning.hlo import Collective, find_collectives, refused_bytes, summarize

# Cut out of programs that libtpu 0.0.42.1 made of the training step, for v5e:2x2.
CHAINED = """
HloModule jit_step, is_scheduled=true, num_partitions=4

%wide.region_18 (wide.param.35: (s32[], bf16[64,1024])) -> pred[] {
  %wide.param.35 = (s32[]{:T(128)}, bf16[64,1024]{1,0:T(8,128)(2,1)}) parameter(0)
  %constant.1512.clone.1 = s32[]{:T(128)} constant(32)
  %get-tuple-element.7189 = s32[]{:T(128)} get-tuple-element(%wide.param.35), index=0
  ROOT %lt.328 = pred[]{:T(512)} compare(%get-tuple-element.7189, %constant.1512.clone.1), direction=LT, metadata={op_name="jit(step)/while/body/while/cond/lt" stack_frame_id=249}
}

%fused_computation.1011 (param_0.3924: bf16[64,1024]) -> (bf16[64,1024], bf16[256,1024], /*index=5*/u32[]) {
  %param_0.3924 = bf16[64,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.597 = bf16[256,1024]{1,0:T(8,128)(2,1)} all-gather(%param_0.3924), channel_id=127, replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="22"}
}

%fused_computation.1012 (param_0.3927: bf16[64,1024]) -> (bf16[64,1024], bf16[256,1024]) {
  %param_0.3927 = bf16[64,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.599 = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} all-gather(%param_0.3927), channel_id=127, replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="22"}
}

%wide.region_13 (wide.param.34: (s32[], bf16[64,1024])) -> (s32[], bf16[64,1024]) {
  %fusion.1 = (bf16[64,1024]{1,0:T(8,128)(2,1)}, bf16[256,1024]{1,0}) fusion(%get-tuple-element.1), kind=kOutput, calls=%fused_computation.1011
  %fusion.2 = (bf16[64,1024]{1,0:T(8,128)(2,1)}, bf16[256,1024]{1,0}) fusion(%get-tuple-element.2), kind=kOutput, calls=%fused_computation.1012
}

%wide.region_24 (wide.param.45: (s32[], s32[])) -> pred[] {
  %get-tuple-element.8047 = s32[]{:T(128)} get-tuple-element(%wide.param.45), index=0
  %get-tuple-element.8048 = s32[]{:T(128)} get-tuple-element(%wide.param.45), index=4
  ROOT %lt.342 = pred[]{:T(512)} compare(%get-tuple-element.8047, %get-tuple-element.8048), direction=LT, metadata={op_name="jit(step)/while/cond/lt" stack_frame_id=12}
}

%all-reduce-scatter.7.clone.1 (input.9: f32[256,1024]) -> f32[64,1024] {
  %input.9 = f32[256,1024]{1,0:T(8,128)} parameter(0)
  %all-reduce.152 = f32[256,1024]{1,0:T(8,128)} all-reduce(%input.9), channel_id=4, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add.22.clone
  ROOT %dynamic-slice.5 = f32[64,1024]{1,0:T(8,128)S(1)} dynamic-slice(%all-reduce.152, %multiply.3, %constant.4), dynamic_slice_sizes={64,1024}
}

%wide.region_0 (wide.param.46: (s32[], s32[])) -> (s32[], s32[]) {
  %while.524 = (s32[]{:T(128)}, /*index=5*/bf16[64,1024]{1,0:T(8,128)(2,1)S(1)}) while(%tuple.875), condition=%wide.region_18, body=%wide.region_13, metadata={op_name="jit(step)/while/body/while" stack_frame_id=206}
  %fusion.955 = f32[64,1024]{1,0:T(8,128)S(1)} fusion(%fusion.954), kind=kCustom, calls=%all-reduce-scatter.7.clone.1
}

ENTRY %main.112_spmd (param.55: s32[], param.63: f32[1024,64]) -> (s32[], f32[1024,64]) {
  %while.516 = (s32[]{:T(128)}, s32[]{:T(128)}) while(%tuple.920), condition=%wide.region_24, body=%wide.region_0, metadata={op_name="jit(step)/while" stack_frame_id=15}
  %all-reduce.159 = (f32[256]{0:T(256)S(1)}, f32[256]{0:T(256)S(1)}) all-reduce(%fusion.1104, %fusion.1105), channel_id=172, replica_groups=mesh['axis_0'=4] {'axis_0'}, use_global_device_ids=true, to_apply=%add.15
}
"""  # noqa: E501

# For 2*v5e:2x2.
BETWEEN_SLICES = """
ENTRY %main.112_spmd (param.55: s32[]) -> (s32[]) {
  %send.43 = (f32[64,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%bitcast.2157, %after-all.43), channel_id=6, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.168_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.43 = (f32[64,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%after-all.43), channel_id=5, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %send.20 = (pred[2,1,4]{2,0,1:T(4,128)(4,1)}, u32[], token[]) send(%param.57, %after-all.20), channel_id=42, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_GATHER"}
}
"""  # noqa: E501


def only(line: str, num_devices: int = 8) -> Collective:
    (found,) = find_collectives(f"ENTRY %main (p: s32[]) -> s32[] {{\n  {line}\n}}\n", num_devices=num_devices)
    return found


def test_a_collective_spread_over_fusions_counts_once_and_as_often_as_its_loops_run():
    found = {one.kind: one for one in find_collectives(CHAINED, num_devices=4)}
    assert len(find_collectives(CHAINED, num_devices=4)) == len(found) == 3
    assert found["all-gather"] == Collective("all-gather", (None, 32), 4, 256 * 1024 * 2, False, True)
    assert found["all-gather"].times(3) == 96


def test_an_all_reduce_of_which_each_device_keeps_a_part_is_a_reduce_scatter():
    found = {one.kind: one for one in find_collectives(CHAINED, num_devices=4)}
    assert found["reduce-scatter"] == Collective("reduce-scatter", (None,), 4, 256 * 1024 * 4, False)
    assert found["all-reduce"] == Collective("all-reduce", (), 4, 2 * 256 * 4, False)


def test_collectives_between_slices_are_distinguished():
    found = find_collectives(BETWEEN_SLICES, num_devices=8, num_slices=2)
    assert found == [
        Collective("all-reduce", (), 2, 64 * 8 * 128 * 4, True, True),
        Collective("all-gather", (), 2, 2 * 2 * 4, True, True),
    ]


def test_bytes_sent_are_the_fewest_that_a_ring_needs():
    def sent(kind):
        return Collective(kind, (), 4, 1000, False).bytes_sent

    assert [sent(kind) for kind in ("all-gather", "reduce-scatter", "all-to-all")] == [750, 750, 750]
    assert (sent("all-reduce"), sent("collective-permute")) == (1500, 1000)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", 2),
        ("replica_groups={}", 8),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", 2),
    ],
)
def test_groups_are_read_in_every_spelling(groups, size):
    one = only(f"%all-reduce.1 = f32[16]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add")
    assert (one.num_devices, one.payload) == (size, 64)


def test_a_group_of_one_device_is_no_collective():
    text = "ENTRY %m (p: s32[]) -> s32[] {\n  %r = f32[4]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%a\n}\n"
    assert find_collectives(text, num_devices=2) == []


@pytest.mark.parametrize(
    ("line", "kind", "payload"),
    [
        ("%a = (f32[4]{0}, f32[32]{0}) all-gather-start(%x), replica_groups={}, dimensions={0}", "all-gather", 128),
        ("%a = f32[4]{0} reduce-scatter(%x), replica_groups={}, dimensions={0}, to_apply=%add", "reduce-scatter", 128),
        ("%a = f32[32]{0} all-reduce-start(%x), replica_groups={}, to_apply=%add", "all-reduce", 128),
        ("%a = s8[3,5]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}", "collective-permute", 15),
    ],
)
def test_the_payload_is_that_of_the_whole_however_it_is_started(line, kind, payload):
    assert (only(line).kind, only(line).payload) == (kind, payload)
    assert not only(line).overlaps


def test_the_end_of_an_asynchronous_collective_is_not_counted_again():
    text = """
%async (p: f32[4]) -> f32[32] {
  ROOT %g = f32[32]{0} all-gather(%p), channel_id=1, replica_groups={}, dimensions={0}
}

ENTRY %main (p: f32[4]) -> f32[32] {
  %s = ((f32[4]{0}), f32[32]{0}, s32[]) async-start(%p), calls=%async
  ROOT %d = f32[32]{0} async-done(%s), calls=%async
}
"""
    assert len(find_collectives(text, num_devices=8)) == 1


LARGE, SMALL = "f32[400,400]{1,0} fusion(%before), kind=kLoop", "s32[] fusion(%before), kind=kLoop"


@pytest.mark.parametrize(
    ("between", "overlaps"),
    [
        (LARGE, True), (SMALL, False), ("f32[4]{0} bitcast(%before)", False),
        ('f32[400,400]{1,0} custom-call(), custom_call_target="AllocateBuffer"', False),
        ('f32[4]{0} custom-call(%before), custom_call_target="tpu_custom_call"', True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["direct", "wrapped"])
def test_a_collective_overlaps_only_if_the_schedule_computes_before_it_ends(form, between, overlaps):
    started, ended = {
        "direct": (
            "((f32[4]{0}), f32[32]{0}) all-gather-start(%p), channel_id=1, replica_groups={}, dimensions={0}",
            "f32[32]{0} all-gather-done(%s)",
        ),
        "wrapped": (
            "((f32[4]{0}), f32[32]{0}, s32[]) async-start(%p), calls=%async", "f32[32]{0} async-done(%s), calls=%async"
        ),
    }[form]  # fmt: skip
    text = f"""
%async (q: f32[4]) -> f32[32] {{
  ROOT %g = f32[32]{{0}} all-gather(%q), channel_id=1, replica_groups={{}}, dimensions={{0}}
}}

ENTRY %main (p: f32[4]) -> f32[32] {{
  %before = {LARGE.replace("before", "p")}
  %s = {started}
  %between = {between}
  %d = {ended}
  %after = {LARGE}
}}
"""
    assert [one.overlaps for one in find_collectives(text, num_devices=8)] == [overlaps]


@pytest.mark.parametrize(("before_end", "after_start"), [(SMALL, SMALL), (LARGE, SMALL), (SMALL, LARGE)])
def test_a_collective_that_ends_in_the_next_round_of_a_loop_overlaps_with_what_lies_between(before_end, after_start):
    text = f"""
%body (p: (f32[4])) -> (f32[32]) {{
  %before = f32[32]{{0}} get-tuple-element(%p), index=0
  %first = {before_end}
  %d = f32[32]{{0}} all-gather-done(%before)
  %middle = {LARGE}
  %s = ((f32[4]{{0}}), f32[32]{{0}}) all-gather-start(%middle), channel_id=1, replica_groups={{}}, dimensions={{0}}
  %last = {after_start}
}}

ENTRY %main (p: s32[]) -> s32[] {{
  %w = (s32[]) while(%t), condition=%c, body=%body, backend_config={{"known_trip_count":{{"n":"5"}}}}
}}
"""
    (found,) = find_collectives(text, num_devices=8)
    assert found.overlaps == (LARGE in (before_end, after_start))


def test_a_trip_count_that_the_compiler_noted_is_taken():
    text = """
%body (p: (s32[])) -> (s32[]) {
  %g = f32[32]{0} all-gather(%p), channel_id=1, replica_groups={}, dimensions={0}
}

ENTRY %main (p: s32[]) -> s32[] {
  %w = (s32[]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"},"known_init_step":{}}
}
"""
    assert [one.loops for one in find_collectives(text, num_devices=8)] == [(5,)]


UNROLLED = """
%cond (p: (f32[4], u32[])) -> pred[] {
  %constant.6980 = u32[]{:T(128)} constant(8)
  %get-tuple-element.1 = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %compare.1 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.6980), direction=LT
}

%body (p: (f32[4], u32[])) -> (f32[4], u32[]) {
  %constant.7 = u32[]{:T(128)} constant(2)
  %get-tuple-element.2 = u32[]{:T(128)} get-tuple-element(%p), index=1
  %add.3349 = u32[]{:T(128)} add(%get-tuple-element.2, %constant.7), metadata={op_name="jit(step)/while"}
  %permute.1 = f32[4]{0} collective-permute(%x), channel_id=4, source_target_pairs={{0,1},{1,0}}
  ROOT %tuple.9 = (f32[4]{0}, u32[]{:T(128)}) tuple(%permute.1, %add.3349)
}

ENTRY %main (p: s32[]) -> s32[] {
  %while.1 = (f32[4]{0}, u32[]{:T(128)}) while(%tuple.1), condition=%cond, body=%body
}
"""


def test_a_loop_that_counts_by_two_runs_half_as_often():
    assert [one.loops for one in find_collectives(UNROLLED, num_devices=2)] == [(4,)]


def test_collectives_are_added_up_by_kind_and_loops_with_the_most_bytes_first():
    few, many = Collective("all-reduce", (), 2, 100, False), Collective("all-gather", (None, 3), 2, 100, False)
    rows = summarize([few, many, many], unknown=2)
    assert [(row["kind"], row["loops"], row["places"], row["times"], row["bytes"]) for row in rows] == [
        ("all-gather", "microbatches × 3", 2, 12, 600.0),
        ("all-reduce", "", 1, 1, 100.0),
    ]


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (48.98G) "
            "exceeds available HBM (15.75G).",
            (round(48.98 * 2**30), round(15.75 * 2**30)),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.00M of 15.75G hbm. Exceeded",
            (512 * 2**20, round(15.75 * 2**30)),
        ),
        ("INTERNAL: something else", None),
    ],
)
def test_a_refusal_says_how_many_bytes_it_needs(message, sizes):
    assert refused_bytes(message) == sizes
