"""Metrics: values, twins, and the sum over router replicas."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from dspark.cluster.http.metering import Family, Meter, Timing, engine_families, exposition, merged
from dspark.types import Finish, ReplicaView
from dspark.workers.wire.codec import Status


def series(families: list[Family]) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    parsed = text_string_to_metric_families(exposition(families).decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in parsed for s in family.samples}


MODEL = (("model_name", "m"),)


def one_request() -> Meter:
    """Arrived at 10, chunks of 1 and 3 tokens at 10.5 and 10.8, over at 11."""
    meter = Meter("m")
    timing = Timing(10.0)
    meter.took(7)
    meter.chunk(timing, 10.5, None, 1)
    meter.chunk(timing, 10.8, 10.5, 3)
    meter.ended(timing, 11.0, [Finish.STOP], 1, 2)
    return meter


def test_times_and_tokens() -> None:
    values = series(one_request().families())
    for prefix in ("dspark_", "vllm:"):
        assert values[prefix + "time_to_first_token_seconds_sum", MODEL] == 0.5
        assert values[prefix + "e2e_request_latency_seconds_sum", MODEL] == 1.0
        assert values[prefix + "prompt_tokens_total", MODEL] == 7
        assert values[prefix + "generation_tokens_total", MODEL] == 4
    assert abs(values["dspark_inter_chunk_latency_seconds_sum", MODEL] - 0.3) < 1e-9
    assert abs(values["vllm:inter_token_latency_seconds_sum", MODEL] - 0.3) < 1e-9
    assert abs(values["dspark_time_per_output_token_seconds_sum", MODEL] - 0.1) < 1e-9
    assert values["dspark_tokens_per_chunk_sum", MODEL] == 4
    assert values["dspark_requests_total", (("finished_reason", "stop"), *MODEL)] == 1
    assert values["vllm:request_success_total", (("finished_reason", "stop"), *MODEL)] == 1
    assert values["dspark_replays_total", MODEL] == 1
    assert values["dspark_moves_total", MODEL] == 2


def test_a_request_without_tokens_has_no_token_times() -> None:
    meter = Meter("m")
    meter.ended(Timing(1.0), 3.0, [Finish.ABORT], 0, 0)
    values = series(meter.families())
    assert values["dspark_time_to_first_token_seconds_count", MODEL] == 0
    assert values["dspark_time_per_output_token_seconds_count", MODEL] == 0
    assert values["dspark_e2e_request_latency_seconds_sum", MODEL] == 2


def test_replicas_add_up() -> None:
    parts = [one_request().families(), one_request().families(), Meter("m").families()]
    values = series(merged(parts))
    assert values["dspark_time_to_first_token_seconds_sum", MODEL] == 1.0
    assert values["dspark_requests_total", (("finished_reason", "stop"), *MODEL)] == 2
    bucket = (("le", "0.5"), *MODEL)
    assert values["dspark_time_to_first_token_seconds_bucket", bucket] == 2


def test_engine_counters_keep_their_replica() -> None:
    view = ReplicaView("r1", "x:1", 2, 1, 8, 0, 10, 20, draining=True)
    stats = {
        "num_requests_running": 1.0,
        "drafted_rounds_total": 5.0,
        "draft_tokens_total": 9.0,
        "accepted_tokens_total": 4.0,
        "generation_tokens_total": 99.0,
        'accepted_tokens_per_pos_total{position="0"}': 3.0,
        'accepted_tokens_per_pos_total{position="1"}': 1.0,
        'survival_ece_per_pos{position="1"}': 0.25,
    }
    values = series(engine_families([Status(view, False, stats)], "m"))
    labels = (*MODEL, ("replica", "r1"))
    assert values["vllm:num_requests_running", labels] == values["dspark_num_requests_running", labels] == 1
    assert values["vllm:spec_decode_num_drafts_total", labels] == 5
    assert values["vllm:spec_decode_num_draft_tokens_total", labels] == 9
    assert values["vllm:spec_decode_num_accepted_tokens_total", labels] == 4
    by_position = [values["vllm:spec_decode_num_accepted_tokens_per_pos_total", (*MODEL, ("position", k), labels[-1])] for k in "01"]
    assert by_position == [3, 1]
    assert values["dspark_survival_ece_per_pos", (*MODEL, ("position", "1"), labels[-1])] == 0.25
    assert (values["dspark_healthy", labels], values["dspark_draining", labels]) == (0, 1)
    assert not any(name.endswith("generation_tokens_total") for name, _ in values), "counted per request by the router"
