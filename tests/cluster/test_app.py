"""Builders and the Serve file, without starting anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from dspark.cluster.app import FAR_OUT, LEEWAY_S, as_config, build, build_colocated, build_disaggregated
from dspark.cluster.ranks import CPU_OF_A_RANK
from dspark.config import ServeConfig
from dspark.config_file import load_config
from dspark.errors import ConfigError

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


@pytest.mark.parametrize(("topology", "build"), [("colocated", build_colocated), ("disaggregated", build_disaggregated)])
def test_the_serve_files_are_valid_and_have_only_known_keys(topology: str, build: Callable[..., Application]) -> None:
    values = yaml.safe_load((DEPLOY / f"{topology}.yaml").read_text())
    schema = ServeDeploySchema(**values)
    (application,) = schema.applications
    assert set(values) <= set(ServeDeploySchema.model_fields)
    assert set(values["applications"][0]) <= set(type(application).model_fields)
    assert as_config(application.args, topology) == load_config(None, {}, {"topology": topology}), "the file shows the defaults"
    assert application.import_path == f"{build.__module__}:{build.__name__}"


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


def test_a_disaggregated_application_has_draft_workers() -> None:
    config = ServeConfig(topology="disaggregated", num_verifiers=3, num_draft_workers=2)
    verifier = build(config)._bound_deployment.init_args[0]._bound_deployment
    worker = verifier.init_args[2]._bound_deployment
    assert (verifier.name, verifier.num_replicas) == ("Verifier", 3)
    assert (worker.name, worker.num_replicas) == ("DraftWorker", 2)
    assert worker.max_ongoing_requests == FAR_OUT
    colocated = build(ServeConfig())._bound_deployment.init_args[0]._bound_deployment
    assert len(colocated.init_args) == 2


def test_builders_refuse_the_other_topology() -> None:
    with pytest.raises(ConfigError, match="this application is colocated"):
        build_colocated({"topology": "disaggregated"})
    with pytest.raises(ConfigError, match="this application is disaggregated"):
        build_disaggregated(ServeConfig())
    assert build_disaggregated({})._bound_deployment.name == "Router"


def test_draft_workers_may_have_a_device_of_their_own() -> None:
    app = build_disaggregated({"engine": {"device": "cpu"}, "draft_device": "cuda"})
    verifier = app._bound_deployment.init_args[0]._bound_deployment
    assert verifier.ray_actor_options["num_gpus"] == 0
    assert verifier.init_args[2]._bound_deployment.ray_actor_options["num_gpus"] == 1
    with pytest.raises(ConfigError, match="draft_device cuda:1"):
        build_disaggregated({"draft_device": "cuda:1"})


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
