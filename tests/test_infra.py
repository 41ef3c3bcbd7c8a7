"""What `infra/` holds is what its readers accept: published schemas, linters, and the project's own rules."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from pipeline.config import WorkersConfig

ROOT = Path(__file__).resolve().parent.parent
INFRA = ROOT / "infra"
SCHEMAS = ROOT / "tests" / "schemas"
CLUSTER = INFRA / "kubernetes" / "cluster.yaml"
CLOUDS = sorted((INFRA / "clouds").glob("*.yaml"))
SCRIPTS = [*INFRA.rglob("*.sh"), ROOT / ".ci" / "run"]


def kubernetes(schema: Any) -> Any:
    """*schema* of a CRD as Kubernetes means it: fields that are not there are errors, some texts may be numbers."""
    if isinstance(schema, list):
        return [kubernetes(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: kubernetes(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
    return strict


def custom_resource(name: str) -> Any:
    return kubernetes(json.loads((SCHEMAS / f"{name}.json").read_text()))


def errors(value: Any, schema: Any) -> list[str]:
    found = jsonschema.Draft202012Validator(schema).iter_errors(value)
    return [f"{'.'.join(map(str, one.absolute_path))}: {one.message}" for one in found]


def ray_schema() -> Any:
    return json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())


def compose() -> dict[str, Any]:
    """The compose file with the values of compose.env, as Docker would fill them in."""
    text = (INFRA / "compose.yaml").read_text()
    values = dict(re.findall(r"^(\w+)=(.*)$", (INFRA / "compose.env").read_text(), re.M))
    filled = re.sub(r"\$\{(\w+)(?::\?)?\}", lambda match: values[match.group(1)], text)
    content: dict[str, Any] = yaml.safe_load(filled)
    return content


def merged(target: Any, patch: Any) -> Any:
    """A JSON merge patch (RFC 7386)."""
    if not isinstance(patch, dict) or not isinstance(target, dict):
        return patch
    return {**target, **{name: merged(target.get(name), value) for name, value in patch.items()}}


def containers(cluster: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(group, pod, container) of a RayCluster."""
    spec = cluster["spec"]
    for name, group in [("head", spec["headGroupSpec"]), *((g["groupName"], g) for g in spec["workerGroupSpecs"])]:
        pod = group["template"]["spec"]
        yield name, pod, pod["containers"][0]


def test_the_cluster_fits_kuberays_definition() -> None:
    assert errors(yaml.safe_load(CLUSTER.read_text())["spec"], custom_resource("raycluster")) == []


def test_the_cluster_with_a_fault_tolerant_head_does_too() -> None:
    patch = yaml.safe_load((INFRA / "kubernetes" / "fault-tolerant-head.yaml").read_text())
    patched = merged(yaml.safe_load(CLUSTER.read_text()), patch)
    assert patched["spec"]["gcsFaultToleranceOptions"]["redisAddress"]
    assert errors(patched["spec"], custom_resource("raycluster")) == []


def test_the_job_fits_kuberays_definition_and_names_the_cluster() -> None:
    job = yaml.safe_load((INFRA / "kubernetes" / "job.yaml").read_text())
    assert errors(job["spec"], custom_resource("rayjob")) == []
    assert job["spec"]["clusterSelector"]["ray.io/cluster"] == yaml.safe_load(CLUSTER.read_text())["metadata"]["name"]
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]


@pytest.mark.parametrize(
    "path",
    [
        "spec.autoscalerOption",
        "spec.headGroupSpec.template.spec.containers.0.img",
        "spec.workerGroupSpecs.0.minReplica",
    ],
)
def test_a_misspelled_field_is_found(path: str) -> None:
    cluster = copy.deepcopy(yaml.safe_load(CLUSTER.read_text()))
    *parents, name = path.split(".")
    place: Any = cluster
    for parent in parents:
        place = place[int(parent) if parent.isdigit() else parent]
    place[name] = "1"
    assert any(f"'{name}' was unexpected" in one for one in errors(cluster["spec"], custom_resource("raycluster")))


def test_the_cluster_keeps_what_its_comments_promise() -> None:
    cluster = yaml.safe_load(CLUSTER.read_text())
    assert cluster["spec"]["rayVersion"] == metadata.version("ray")
    assert cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert len({container["image"] for _, _, container in containers(cluster)}) == 1
    units = {"Gi": 2**30, "G": 10**9}
    for name, pod, container in containers(cluster):
        assert container["resources"]["requests"] == container["resources"]["limits"], name
        assert pod["securityContext"]["runAsNonRoot"], name
        shared = next(one for one in pod["volumes"] if one["name"] == "shared-memory")["emptyDir"]
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"], name
        shm, memory = (
            int(text[:-2]) * units[text[-2:]]
            for text in (shared["sizeLimit"], container["resources"]["limits"]["memory"])
        )
        assert shm < memory / 2, name
        group = next((one for one in cluster["spec"]["workerGroupSpecs"] if one["groupName"] == name), None)
        if group:
            assert int(group["rayStartParams"]["object-store-memory"]) < shm, name


def test_no_manifest_holds_a_secret() -> None:
    for path in INFRA.rglob("*.yaml"):
        for name, value in re.findall(
            r"^\s*-?\s*\"?([\w-]*(?:PASSWORD|TOKEN|SECRET\w*))\"?: *(\S.*)$", path.read_text(), re.M
        ):
            assert value.startswith(('"${', "${")), f"{path.name}: {name}"
        assert yaml.safe_load(path.read_text()).get("kind") != "Secret", path.name


def test_the_compose_file_fits_its_specification() -> None:
    schema = json.loads((SCHEMAS / "compose.json").read_text())
    validator = jsonschema.Draft7Validator(schema)
    assert [one.message for one in validator.iter_errors(compose())] == []
    wrong = compose()
    wrong["services"]["storage"]["healthchek"] = {}
    assert any("healthchek" in one.message for one in validator.iter_errors(wrong))


def test_the_containers_wait_for_services_that_say_when_they_are_ready() -> None:
    services = compose()["services"]
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[needed], f"{name} waits for {needed}"
    assert all(port.startswith("127.0.0.1:") for one in services.values() for port in one.get("ports", []))
    assert all(
        re.search(r":[^:]*\d", one["image"]) for one in services.values() if not one["image"].startswith("tmad:")
    )


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.stem)
def test_a_cluster_file_fits_rays_schema(path: Path) -> None:
    cluster = yaml.safe_load(path.read_text())
    assert errors(cluster, ray_schema()) == []
    nodes = cluster["available_node_types"]
    assert nodes[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    assert errors({**cluster, "worker_nodes": {}}, ray_schema()) != []
    for name, node in nodes.items():
        if name != cluster["head_node_type"]:
            assert re.search(r"spot|preemptible", json.dumps(node["node_config"]), re.I), f"{name} is no spot node"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_pass_shellcheck(path: Path) -> None:
    run = subprocess.run([tool("shellcheck"), str(path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_the_dockerfile_passes_hadolint(tmp_path: Path) -> None:
    run = subprocess.run([tool("hadolint"), "--no-color", str(INFRA / "Dockerfile")], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    broken = tmp_path / "Dockerfile"
    broken.write_text("FROM python:latest\nRUN cd /x && pip install torch\n")
    assert subprocess.run([tool("hadolint"), str(broken)], capture_output=True).returncode != 0


def test_every_image_of_others_is_named_by_its_digest() -> None:
    ours = re.compile(r"tmad:|registry\.example\.com/tmad:")
    named = [service["image"] for service in compose()["services"].values()]
    for path in INFRA.rglob("*.yaml"):
        named += re.findall(r"\bimage: (?:&\w+ )?\"?([\w./-]+:[^\s\"]+)", path.read_text())
    dockerfile = (INFRA / "Dockerfile").read_text()
    (python,) = re.findall(r"^ARG PYTHON=(.+)$", dockerfile, re.M)
    assert set(re.findall(r"^FROM (\S+)", dockerfile, re.M)) == {"python:${PYTHON}"}
    others = {one for one in named if not ours.match(one)} | {python}
    assert len(others) == 5
    assert [one for one in others if not re.search(r"@sha256:[0-9a-f]{64}$", one)] == []


def test_the_image_has_no_root_and_no_build_tools_and_copies_only_what_it_needs() -> None:
    text = (INFRA / "Dockerfile").read_text()
    stages = re.findall(r"^FROM (\S+) AS (\w+)$", text, re.M)
    assert [name for _, name in stages] == ["build", "run"]
    last = text[text.index(" AS run") :]
    assert re.search(r"^USER 1000", last, re.M)
    assert "pip install" not in last
    copied = {name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M) for name in line.split()}
    allowed = set(re.findall(r"^!(.+)$", (INFRA / "Dockerfile.dockerignore").read_text(), re.M))
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


def test_what_a_user_must_change_is_marked() -> None:
    """A manifest with an example's value in it says so in that line or the one before."""
    example = re.compile(r"example\.|s3://bucket|us-(?:west|east|central)")
    for path in [*INFRA.rglob("*.yaml"), *INFRA.rglob("*.sh"), INFRA / "compose.env"]:
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            if example.search(line) and not line.lstrip().startswith("#") and path.name != "compose.yaml":
                around = "\n".join(lines[max(0, number - 4) : number + 1])
                assert "CHANGE ME" in around, f"{path.name}:{number + 1}: {line}"


def tool(name: str) -> str:
    """The linter that the development packages bring."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; `make setup` brings it")
    return found


def test_a_submission_uploads_the_code_and_nothing_else(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import _dir_travel

    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, tmp_path)
    large = (
        "photos/a.jpg",
        "data/train/shards/0.parquet",
        "runs/first/model",
        "my sets/a",
        "model.safetensors",
        "mlruns/1",
    )
    for name in (*large, "jobs/train_places.py", "pipeline/data/order.py", "tmad/step.py", "tmad/__pycache__/step.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    uploaded: list[str] = []
    _dir_travel(
        tmp_path,
        [],
        lambda path: uploaded.append(str(path.relative_to(tmp_path))) if path.is_file() else None,
        include_gitignore=True,
    )
    assert sorted(uploaded) == [
        *(".gitignore", ".rayignore", "jobs/train_places.py", "pipeline/data/order.py", "tmad/step.py"),
    ]


def test_what_a_submission_of_this_checkout_uploads_is_below_rays_limit() -> None:
    """Ray refuses 100 MiB with an error of its server; the model in the box is most of what there is."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    sizes: list[int] = []
    excludes = _get_excludes(ROOT, get_runtime_env_default_excludes())
    add = lambda path: sizes.append(path.stat().st_size) if path.is_file() else None  # noqa: E731
    _dir_travel(ROOT, [excludes], add, include_gitignore=True)
    assert len(sizes) > 10
    assert sum(sizes) < 50 * 2**20


def test_the_image_has_every_optional_package_that_a_job_can_ask_for() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (installed,) = re.findall(r'"\.\[([a-z,]+)\]"', (INFRA / "Dockerfile").read_text())
    assert {*installed.split(",")} == extras.keys() - {"dev"}


def test_every_head_gives_a_stopped_training_the_time_for_its_last_checkpoint() -> None:
    """Ray's own three seconds are too short for it; clusters of the image have the image's environment."""
    grace = WorkersConfig().stop_grace_s
    for path in (INFRA / "Dockerfile", INFRA / "slurm" / "train.sh", INFRA / "stack.py"):
        (seconds,) = re.findall(r'RAY_JOB_STOP_WAIT_TIME_S(?:=|": ")(\d+)', path.read_text())
        assert int(seconds) >= 2 * grace, path.name


# What the operator refuses beyond the schema (KubeRay 1.6, `validation.go`): a rule in words, and whether an object
# breaks it, and a change that does.
Rule = tuple[str, Callable[[dict[str, Any]], bool], Callable[[dict[str, Any]], object]]


def _groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def _is_label(name: str, longest: int) -> bool:
    return len(name) <= longest and re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) is not None


JOB_RULES: list[Rule] = [
    (
        "a name is a DNS label of 47 characters at most",
        lambda job: not _is_label(job["metadata"]["name"], 47),
        lambda job: job["metadata"].update(name="Places_2"),
    ),
    (
        "ttlSecondsAfterFinished goes with shutdownAfterJobFinishes",
        lambda job: job["spec"].get("ttlSecondsAfterFinished", 0) > 0 and not job["spec"]["shutdownAfterJobFinishes"],
        lambda job: job["spec"].update(ttlSecondsAfterFinished=86400),
    ),
    (
        "a cluster is selected or described",
        lambda job: not job["spec"].get("clusterSelector") and not job["spec"].get("rayClusterSpec"),
        lambda job: job["spec"].pop("clusterSelector"),
    ),
    (
        "a selector names the cluster",
        lambda job: "clusterSelector" in job["spec"] and not job["spec"]["clusterSelector"].get("ray.io/cluster"),
        lambda job: job["spec"].update(clusterSelector={"cluster": "tmad"}),
    ),
    (
        "a job with a selector is neither suspended nor submitted from a sidecar",
        lambda job: (
            "clusterSelector" in job["spec"]
            and (job["spec"].get("suspend", False) or job["spec"].get("submissionMode") == "SidecarMode")
        ),
        lambda job: job["spec"].update(submissionMode="SidecarMode"),
    ),
    (
        "a deletion strategy needs a feature gate",
        lambda job: "deletionStrategy" in job["spec"],
        lambda job: job["spec"].update(deletionStrategy={}),
    ),
    (
        "deadlines are positive, retries not negative, and there are none in the interactive mode",
        lambda job: (
            job["spec"].get("activeDeadlineSeconds", 1) <= 0
            or job["spec"].get("backoffLimit", 0) < 0
            or (job["spec"].get("submissionMode") == "InteractiveMode" and job["spec"].get("backoffLimit", 0) > 0)
        ),
        lambda job: job["spec"].update(activeDeadlineSeconds=0),
    ),
    (
        "the runtime environment is YAML",
        lambda job: not isinstance(yaml.safe_load(job["spec"]["runtimeEnvYAML"]), dict),
        lambda job: job["spec"].update(runtimeEnvYAML="env_vars"),
    ),
]

CLUSTER_RULES: list[Rule] = [
    (
        "a name is a DNS label of 63 characters at most",
        lambda cluster: not _is_label(cluster["metadata"]["name"], 63),
        lambda cluster: cluster["metadata"].update(name="1st"),
    ),
    (
        "a group has its resources from `ray start` or from its own field",
        lambda cluster: any(
            group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & group["rayStartParams"].keys()
            for group in _groups(cluster["spec"])
        ),
        lambda cluster: cluster["spec"]["headGroupSpec"].update(resources={"CPU": "0"}),
    ),
    (
        "labels of a group are not an argument of `ray start`",
        lambda cluster: any("labels" in group["rayStartParams"] for group in _groups(cluster["spec"])),
        lambda cluster: cluster["spec"]["headGroupSpec"]["rayStartParams"].update(labels="a=b"),
    ),
    (
        "with the autoscaler a group is not suspended, with its second version a pod is not restarted",
        lambda cluster: any(
            group.get("suspend") or group["template"]["spec"].get("restartPolicy", "Never") != "Never"
            for group in _groups(cluster["spec"])
        ),
        lambda cluster: cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"].update(restartPolicy="Always"),
    ),
    (
        "a token needs a Ray version of 2.52 or newer",
        lambda cluster: tuple(map(int, cluster["spec"].get("rayVersion", "0").split("."))) < (2, 52),
        lambda cluster: cluster["spec"].pop("rayVersion"),
    ),
    (
        "Redis, the autoscaler's version and the user's name are set by fields, not by variables or arguments",
        lambda cluster: bool(
            {"redis-password", "redis-username"} & cluster["spec"]["headGroupSpec"]["rayStartParams"].keys()
            or {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_enable_autoscaler_v2"}
            & {one["name"] for _, _, container in containers(cluster) for one in container.get("env", [])}
        ),
        lambda cluster: cluster["spec"]["headGroupSpec"]["rayStartParams"].update({"redis-password": "x"}),
    ),
]


@pytest.mark.parametrize("rule", [*JOB_RULES, *CLUSTER_RULES], ids=lambda rule: rule[0])
def test_the_operator_takes_the_manifests(rule: Rule) -> None:
    _, is_broken, do_break = rule
    if rule in JOB_RULES:
        manifests = [yaml.safe_load((INFRA / "kubernetes" / "job.yaml").read_text())]
    else:
        plain = yaml.safe_load(CLUSTER.read_text())
        patch = yaml.safe_load((INFRA / "kubernetes" / "fault-tolerant-head.yaml").read_text())
        manifests = [plain, merged(plain, patch)]
    assert not any(map(is_broken, manifests))
    broken = copy.deepcopy(manifests[0])
    do_break(broken)
    assert is_broken(broken)


def test_no_container_of_the_cluster_gains_privileges_or_keeps_capabilities() -> None:
    cluster = yaml.safe_load(CLUSTER.read_text())
    job = yaml.safe_load((INFRA / "kubernetes" / "job.yaml").read_text())
    submitter = job["spec"]["submitterPodTemplate"]["spec"]
    pods = [*((pod, container) for _, pod, container in containers(cluster)), (submitter, submitter["containers"][0])]
    assert submitter["containers"][0]["image"] == pods[0][1]["image"]
    secured = [container["securityContext"] for _, container in pods]
    for context in (*secured, cluster["spec"]["autoscalerOptions"]["securityContext"]):
        assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    for pod, _ in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
