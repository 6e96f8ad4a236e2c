"""Builders and the Serve file, without starting anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from dspark.cluster.app import FAR_OUT, LEEWAY_S, as_config, build_colocated
from dspark.cluster.ranks import CPU_OF_A_RANK
from dspark.config import ServeConfig
from dspark.config_file import load_config
from dspark.errors import ConfigError

FILE = Path(__file__).resolve().parents[2] / "deploy" / "colocated.yaml"


def test_the_serve_file_is_valid_and_has_only_known_keys() -> None:
    values = yaml.safe_load(FILE.read_text())
    schema = ServeDeploySchema(**values)
    (application,) = schema.applications
    assert set(values) <= set(ServeDeploySchema.model_fields)
    assert set(values["applications"][0]) <= set(type(application).model_fields)
    assert as_config(application.args) == load_config(None, {}, {}), "the file shows the defaults"
    assert application.import_path == f"{build_colocated.__module__}:{build_colocated.__name__}"


def test_deployments_leave_limits_to_us() -> None:
    config = ServeConfig(num_verifiers=3, num_routers=2, drain_s=50)
    app = build_colocated(config)
    router = app._bound_deployment
    verifier = router.init_args[0]._bound_deployment
    for deployment, count in ((router, 2), (verifier, 3)):
        assert deployment.num_replicas == count
        assert deployment.max_ongoing_requests == FAR_OUT
        assert deployment.max_queued_requests == -1
        assert deployment._deployment_config.graceful_shutdown_timeout_s == 50 + LEEWAY_S
        assert deployment.ray_actor_options["num_cpus"] == 0


@pytest.mark.parametrize(("device", "gpus"), [("cpu", 0), ("cuda", 1), ("auto", 0)])
def test_a_verifier_asks_for_the_gpu_it_needs(device: str, gpus: int) -> None:
    app = build_colocated({"engine": {"device": device}})
    assert app._bound_deployment.init_args[0]._bound_deployment.ray_actor_options["num_gpus"] == gpus


@pytest.mark.parametrize(("device", "bundle"), [("cpu", {"CPU": CPU_OF_A_RANK}), ("cuda", {"GPU": 1.0})])
def test_a_parallel_verifier_has_a_place_for_each_rank(device: str, bundle: dict[str, float]) -> None:
    for shape, places in (({"tensor_parallel": 2, "expert_parallel": 3}, [bundle] * 6), ({}, None)):
        app = build_colocated({"engine": {"device": device, **shape}})
        replica = app._bound_deployment.init_args[0]._bound_deployment._replica_config
        assert replica.placement_group_bundles == places
        assert replica.placement_group_strategy == ("PACK" if places else None)


def test_a_numbered_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        build_colocated({"engine": {"device": "cuda:1"}})


def test_unknown_keys_are_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="num_verifiers"):
        build_colocated({"num_verifyers": 1})
    with pytest.raises(ConfigError, match="speculation"):
        build_colocated({"engine": {"speculatoin": "off"}})
