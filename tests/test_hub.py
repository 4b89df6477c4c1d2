"""Models and processors pushed to a Hub and loaded again by the real clients, with and without this package.

The `client_*` functions run in interpreters of their own (see `HubServer.call`). `client_package` fills the Hub and
loads everything by name; the others load where the package cannot be imported, where it could be but is not, and where
the Hub fails. Tensors are compared by their digests, so equal means equal bit for bit.
"""

import contextlib
import hashlib
import importlib.abc
import json
import logging
import sys

import pytest
from hub_server import Blob, HubServer, Repository


# What each repository was pushed from, and the Auto class of transformers that loads it.
REPOSITORIES = {
    "org/joint-mae": ("JointMAEForPreTraining", "AutoModelForPreTraining"),
    "org/joint-mae-encoder": ("JointMAEModel", "AutoModel"),
    "org/joint-mae-classification": ("JointMAEForPointCloudClassification", "AutoModelForImageClassification"),
    "org/joint-mae-segmentation": ("JointMAEForPartSegmentation", "AutoModelForSemanticSegmentation"),
}
FILES = {
    ".gitattributes",
    "README.md",
    "config.json",
    "configuration_joint_mae.py",
    "geometry_joint_mae.py",
    "model.safetensors",
    "modeling_joint_mae.py",
    "point_cloud_processing_joint_mae.py",
    "preprocessor_config.json",
}


# ---- What the clients share


def tiny_config():
    from jointmae_hf import JointMAEConfig

    return JointMAEConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_points=64,
        num_centers=[16, 8],
        num_neighbors=[8, 4],
        point_embed_sizes=[8, 16],
        image_size=16,
        splat_size=3,
        patch_strides=[2, 2],
        image_embed_sizes=[8, 16],
        decoder_hidden_size=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        num_target_points=8,
        classifier_hidden_size=16,
        num_labels=5,
    )


def digest(tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def digests(model) -> dict[str, str]:
    """The features of a fixed batch of clouds, and what the model makes of them."""
    import torch

    generator = torch.Generator().manual_seed(0)
    points = torch.rand(2, 64, 3, generator=generator) * 2 - 1
    model.eval()
    with torch.no_grad():
        features = getattr(model, "joint_mae", model)(points).pooler_output
        torch.manual_seed(0)  # The masks of pre-training.
        outputs = model(points)
    output = next(outputs[name] for name in ("logits", "reconstructed_points", "last_hidden_state") if name in outputs)
    return {"features": digest(features), "output": digest(output)}


def load(repo_id: str, auto_class: str, **options) -> dict:
    """Everything that a repository promises, by the names that transformers gives it."""
    import numpy as np
    import transformers

    model = getattr(transformers, auto_class).from_pretrained(repo_id, **options)
    encoder = transformers.AutoModel.from_pretrained(repo_id, **options)
    config = transformers.AutoConfig.from_pretrained(repo_id, **options)
    processors = [
        getattr(transformers, name).from_pretrained(repo_id, **options)
        for name in ("AutoProcessor", "AutoFeatureExtractor")
    ]
    cloud = np.random.default_rng(0).normal(size=(100, 3)).astype("float32")
    classes = [type(loaded) for loaded in (config, model, encoder, *processors)]
    return {
        "classes": [cls.__name__ for cls in classes],
        "modules": sorted({cls.__module__.split(".")[0] for cls in classes}),
        "model": digests(model),
        "encoder": digests(encoder),
        "points": [digest(processor(cloud, return_tensors="pt")["point_values"]) for processor in processors],
    }


def load_encoder(**options) -> dict:
    """The encoder of a pre-training checkpoint: the weights it lacked, and what transformers had to say about it."""
    from transformers import AutoModel

    with logged_warnings() as warnings:
        _, report = AutoModel.from_pretrained("org/joint-mae", output_loading_info=True, **options)
    return {"missing": sorted(report["missing_keys"]), "warnings": warnings}


def load_revisions(**options) -> dict[str, str]:
    from transformers import AutoModel

    return {
        revision: digests(AutoModel.from_pretrained("org/revised", revision=revision, **options))["features"]
        for revision in ("v1", "main")
    }


@contextlib.contextmanager
def logged_warnings():
    """Collects what transformers logs as a warning or worse."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


# ---- With the package


def client_package() -> dict:
    import jointmae_hf

    seen = {"pushed": push_everything()}
    for repo_id, (_, auto_class) in REPOSITORIES.items():
        seen[repo_id] = load(repo_id, auto_class)
    seen["own names"] = [
        type(auto_class.from_pretrained(repo_id)).__name__
        for auto_class, repo_id in (
            (jointmae_hf.AutoModelForPointCloudClassification, "org/joint-mae-classification"),
            (jointmae_hf.AutoModelForPartSegmentation, "org/joint-mae-segmentation"),
        )
    ]
    seen["encoder"] = load_encoder()
    classifier, report = jointmae_hf.AutoModelForPointCloudClassification.from_pretrained(
        "org/joint-mae", num_labels=5, output_loading_info=True
    )
    seen["head"] = {"missing": sorted(report["missing_keys"]), "features": digests(classifier)["features"]}
    seen["revisions"] = load_revisions()
    return seen


def push_everything() -> dict:
    """Fills the Hub, and returns what each model computed before it was pushed."""
    import torch
    from huggingface_hub import HfApi

    import jointmae_hf

    config, pushed = tiny_config(), {}
    for seed, (repo_id, (name, _)) in enumerate(REPOSITORIES.items()):
        torch.manual_seed(seed)
        model = getattr(jointmae_hf, name)(config)
        model.push_to_hub(repo_id)
        jointmae_hf.JointMAEPointCloudProcessor.from_config(config).push_to_hub(repo_id)
        pushed[repo_id] = digests(model)

    first, second = jointmae_hf.JointMAEModel(config), jointmae_hf.JointMAEModel(config)
    first.push_to_hub("org/revised")
    HfApi().create_tag("org/revised", tag="v1")
    second.push_to_hub("org/revised")
    pushed["org/revised"] = {"v1": digests(first)["features"], "main": digests(second)["features"]}
    return pushed


# ---- Without the package: its code comes from the repository


class Blocker(importlib.abc.MetaPathFinder):
    """Makes the package impossible to import, also where it is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "jointmae_hf":
            raise ModuleNotFoundError(f"No module named {name!r}: blocked by the test", name=name)
        return None


def client_remote_code() -> dict:
    sys.meta_path.insert(0, Blocker())
    from transformers import AutoModelForImageClassification

    remote = {"trust_remote_code": True}
    seen = {repo_id: load(repo_id, auto_class, **remote) for repo_id, (_, auto_class) in REPOSITORIES.items()}
    seen["encoder"] = load_encoder(**remote)
    seen["revisions"] = load_revisions(**remote)
    # What people do next: train it further, push it under a name of their own, load it from there.
    classifier = AutoModelForImageClassification.from_pretrained("org/joint-mae", num_labels=3, **remote)
    classifier.push_to_hub("org/finetuned")
    loaded = AutoModelForImageClassification.from_pretrained("org/finetuned", **remote)
    seen["finetuned"] = [digests(classifier), digests(loaded)]
    return seen


def client_remote_code_beside_the_package() -> dict:
    """Nobody imports the package until the code of the repository, half-way through, looks for its kernels."""
    repo_id = "org/joint-mae"
    return load(repo_id, REPOSITORIES[repo_id][1], trust_remote_code=True)


# ---- With failures


def client_failures() -> dict:
    from unittest.mock import patch

    import torch
    from transformers import AutoModel

    import jointmae_hf

    model = AutoModel.from_pretrained("org/failing")
    seen = {"before": digests(model), "attempts": []}
    with torch.no_grad():
        model.layernorm.bias.add_(1)
    seen["changed"] = digests(model)
    for _ in range(3):
        try:
            with patch("time.sleep"):  # The client waits for seconds between its attempts; that is not the test.
                model.push_to_hub("org/failing")
            outcome = "pushed"
        except Exception as error:
            outcome = type(error).__name__
        seen["attempts"].append([outcome, digests(AutoModel.from_pretrained("org/failing"))])
    try:
        jointmae_hf.JointMAEModel.from_pretrained("org/truncated")
    except Exception as error:
        seen["truncated"] = [type(error).__name__, str(error)]
    return seen


# ---- What they must have seen


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def package(hub, tmp_path_factory):
    return hub.call(client_package, tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def pushed(package):
    return package["pushed"]


@pytest.fixture(scope="module")
def remote(hub, pushed, tmp_path_factory):
    return hub.call(client_remote_code, tmp_path_factory.mktemp("remote"))


@pytest.fixture(scope="module")
def failures(hub, pushed, tmp_path_factory):
    encoder = hub.repository("org/joint-mae-encoder").resolve("main").files
    put(hub, "org/failing", encoder)
    weights = encoder["model.safetensors"].data
    put(hub, "org/truncated", {**encoder, "model.safetensors": Blob(weights[: len(weights) // 2], is_lfs=True)})
    hub.fail_next("PUT", times=6)  # The first attempt and the five that the client adds.
    hub.fail_next("POST", path="/commit/")  # A commit is not tried again.
    return hub.call(client_failures, tmp_path_factory.mktemp("failures"))


def put(hub: HubServer, repo_id: str, files: dict[str, Blob]) -> None:
    """Makes a repository of these files, without the checks that a client does first."""
    repository = Repository("models", repo_id)
    repository.commit("refs/heads/main", files, "initial commit", "", hub.user)
    hub.repositories["models", repo_id] = repository


@pytest.mark.parametrize("repo_id", REPOSITORIES)
def test_a_repository_holds_the_code_and_its_weights_as_safetensors_only(hub, pushed, repo_id):
    files = hub.files(repo_id)
    assert set(files) == FILES
    assert json.loads(files["config.json"])["architectures"] == [REPOSITORIES[repo_id][0]]


@pytest.mark.parametrize("repo_id", REPOSITORIES)
def test_importing_the_package_is_enough_to_load_by_name(pushed, package, repo_id):
    check_loaded(package[repo_id], REPOSITORIES[repo_id][0], pushed[repo_id])
    assert package[repo_id]["modules"] == ["jointmae_hf"]


@pytest.mark.parametrize("repo_id", REPOSITORIES)
def test_the_code_in_the_repository_gives_the_same_bits_without_the_package(pushed, package, remote, repo_id):
    check_loaded(remote[repo_id], REPOSITORIES[repo_id][0], pushed[repo_id])
    assert remote[repo_id]["modules"] == ["transformers_modules"]
    assert remote[repo_id]["points"] == package[repo_id]["points"]


def test_the_code_in_the_repository_works_beside_the_package(hub, pushed, tmp_path):
    seen = hub.call(client_remote_code_beside_the_package, tmp_path)
    check_loaded(seen, "JointMAEForPreTraining", pushed["org/joint-mae"])


def check_loaded(seen: dict, model_class: str, pushed: dict[str, str]) -> None:
    processor = "JointMAEPointCloudProcessor"
    assert seen["classes"] == ["JointMAEConfig", model_class, "JointMAEModel", processor, processor]
    assert seen["model"] == pushed
    assert seen["encoder"]["features"] == pushed["features"]
    assert seen["points"][0] == seen["points"][1]


def test_the_auto_classes_of_the_package_load_the_heads(package):
    assert package["own names"] == ["JointMAEForPointCloudClassification", "JointMAEForPartSegmentation"]


@pytest.mark.parametrize("client", ["package", "remote"])
def test_a_pretrained_checkpoint_holds_every_weight_of_the_encoder(client, request):
    seen = request.getfixturevalue(client)["encoder"]
    assert seen["missing"] == []
    assert not any("MISSING" in warning or "newly initialized" in warning for warning in seen["warnings"])


def test_a_head_on_a_pretrained_checkpoint_misses_only_its_own_weights(pushed, package):
    assert {name.split(".")[0] for name in package["head"]["missing"]} == {"classifier"}
    assert package["head"]["features"] == pushed["org/joint-mae"]["features"]


def test_a_revision_loads_the_weights_of_its_time(pushed, package, remote):
    assert pushed["org/revised"]["v1"] != pushed["org/revised"]["main"]
    assert package["revisions"] == remote["revisions"] == pushed["org/revised"]


def test_a_model_finetuned_from_remote_code_can_be_pushed_and_loaded(hub, remote):
    finetuned, loaded = remote["finetuned"]
    assert finetuned == loaded
    assert {"modeling_joint_mae.py", "model.safetensors"} <= set(hub.files("org/finetuned"))


def test_a_failed_push_leaves_the_previous_weights(failures):
    (storage, after_storage), (commit, after_commit), (retry, after_retry) = failures["attempts"]
    assert failures["before"] != failures["changed"]
    assert storage != "pushed" and after_storage == failures["before"]
    assert commit != "pushed" and after_commit == failures["before"]
    assert retry == "pushed" and after_retry == failures["changed"]


def test_a_truncated_file_of_weights_is_refused_with_a_clear_error(failures):
    kind, message = failures["truncated"]
    assert kind == "SafetensorError" and "incomplete" in message
