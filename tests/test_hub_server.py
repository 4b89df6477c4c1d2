"""The Hub of the tests, judged by the real clients.

Each `client_*` function runs in an interpreter of its own (see `HubServer.call`) and returns what it saw; the tests
below it say what it should have seen. What no client sends, a damaged or half-sent request, comes over plain HTTP.
"""

import base64
import hashlib
import http.client
import json
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hub_server import HubServer


WEIGHTS = b"\0" + bytes(range(256)) * 40  # Not a real file of tensors: the Hub goes by the name.


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        yield hub


# ---- huggingface_hub: repositories, commits, references, files


def client_repository(folder: str) -> dict:
    from pathlib import Path

    from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    api, seen = HfApi(), {}

    def error_of(function, *arguments, **options):
        try:
            function(*arguments, **options)
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
            return [kind.__name__ for kind in type(error).__mro__]
        return ["no error"]

    def content(path, revision="main", **options):
        return Path(hf_hub_download("org/m1", path, revision=revision, **options)).read_bytes().hex()

    seen["created"] = [api.create_repo("org/m1").repo_id, api.create_repo("org/m1", exist_ok=True).repo_id]
    first = api.upload_folder(repo_id="org/m1", folder_path=folder, commit_message="first")
    again = api.upload_folder(repo_id="org/m1", folder_path=folder, commit_message="again")
    seen["same commit"] = first.oid == again.oid

    pull_request = api.upload_file(
        repo_id="org/m1", path_or_fileobj=b"proposed", path_in_repo="a.txt", create_pr=True, commit_message="propose"
    )
    seen["pull request"] = [pull_request.pr_revision, content("a.txt", "refs/pr/1"), content("a.txt")]

    api.create_branch("org/m1", branch="dev")
    api.create_tag("org/m1", tag="v1")
    api.upload_file(repo_id="org/m1", path_or_fileobj=b"dev", path_in_repo="a.txt", revision="dev")
    refs = api.list_repo_refs("org/m1", include_pull_requests=True)
    seen["refs"] = [[ref.name for ref in group] for group in (refs.branches, refs.tags, refs.pull_requests)]
    seen["revisions"] = [content("a.txt", revision) for revision in ("dev", "v1", first.oid)]
    seen["commits"] = [commit.title for commit in api.list_repo_commits("org/m1")]

    seen["files"] = sorted(api.list_repo_files("org/m1"))
    seen["tree"] = [entry.path for entry in api.list_repo_tree("org/m1")]
    seen["folder"] = [entry.path for entry in api.list_repo_tree("org/m1", "sub")]
    seen["paths info"] = [info.path for info in api.get_paths_info("org/m1", ["a.txt", "sub", "nope"])]
    info = api.model_info("org/m1", files_metadata=True)
    seen["siblings"] = {file.rfilename: [file.size, file.lfs and file.lfs.sha256] for file in info.siblings}
    seen["info"] = [info.id, info.sha == first.oid, info.private]

    seen["weights"] = content("w.safetensors")
    seen["cached"] = content("w.safetensors", local_files_only=True) == seen["weights"]
    snapshot = Path(snapshot_download("org/m1"))
    seen["snapshot"] = sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())

    seen["missing file"] = error_of(hf_hub_download, "org/m1", "nope")
    seen["missing repository"] = error_of(hf_hub_download, "org/nope", "a.txt")
    seen["missing revision"] = error_of(hf_hub_download, "org/m1", "a.txt", revision="nope")
    seen["missing file to delete"] = error_of(api.delete_file, "nope", repo_id="org/m1")

    api.delete_file("sub/b.json", repo_id="org/m1")
    seen["after deletion"] = sorted(api.list_repo_files("org/m1"))
    ModelCard("---\nlicense: apache-2.0\npipeline_tag: feature-extraction\n---\n# M1\n").push_to_hub("org/m1")
    seen["card"] = [ModelCard.load("org/m1").data.license, api.model_info("org/m1").pipeline_tag]

    api.create_repo("org/short-lived")
    api.delete_repo("org/short-lived")
    seen["deleted"] = [api.repo_exists("org/short-lived"), api.repo_exists("org/m1")]
    return seen


@pytest.fixture(scope="module")
def seen(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("upload")
    (folder / "sub").mkdir()
    (folder / "a.txt").write_bytes(b"main")
    (folder / "sub" / "b.json").write_bytes(b"{}")
    (folder / "w.safetensors").write_bytes(WEIGHTS)
    return hub.call(client_repository, tmp_path_factory.mktemp("home"), str(folder))


def test_an_existing_repository_is_created_only_once(seen):
    assert seen["created"] == ["org/m1", "org/m1"]


def test_an_unchanged_folder_makes_no_commit(seen):
    assert seen["same commit"]


def test_a_pull_request_leaves_main_alone(seen):
    assert seen["pull request"] == ["refs/pr/1", b"proposed".hex(), b"main".hex()]


def test_branches_tags_and_commits_name_their_own_content(seen):
    assert seen["refs"] == [["main", "dev"], ["v1"], ["refs/pr/1"]]
    assert seen["revisions"] == [b"dev".hex(), b"main".hex(), b"main".hex()]
    assert seen["commits"] == ["first", "initial commit"]


def test_files_are_listed_with_their_storage(seen):
    assert seen["files"] == [".gitattributes", "a.txt", "sub/b.json", "w.safetensors"]
    assert seen["tree"] == [".gitattributes", "a.txt", "sub", "w.safetensors"]
    assert seen["folder"] == ["sub/b.json"]
    assert seen["paths info"] == ["a.txt", "sub"]
    assert seen["info"] == ["org/m1", True, False]
    assert seen["siblings"]["a.txt"] == [4, None]
    assert seen["siblings"]["w.safetensors"] == [len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest()]


def test_downloads_are_what_was_uploaded(seen):
    assert bytes.fromhex(seen["weights"]) == WEIGHTS
    assert seen["cached"]
    assert seen["snapshot"] == seen["files"]


def test_what_is_missing_raises_the_errors_of_the_client(seen):
    assert "EntryNotFoundError" in seen["missing file"]
    assert "RepositoryNotFoundError" in seen["missing repository"]
    assert "RevisionNotFoundError" in seen["missing revision"]
    assert "EntryNotFoundError" in seen["missing file to delete"]


def test_files_cards_and_repositories_can_be_changed_and_deleted(seen):
    assert seen["after deletion"] == [".gitattributes", "a.txt", "w.safetensors"]
    assert seen["card"] == ["apache-2.0", "feature-extraction"]
    assert seen["deleted"] == [False, True]


# ---- huggingface_hub: tokens


def client_tokens(read_token: str) -> dict:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    def status_of(function, *arguments, **options):
        try:
            function(*arguments, **options)
        except HfHubHTTPError as error:
            return error.response.status_code
        return 200

    api = HfApi()
    api.create_repo("org/public")
    api.create_repo("org/private", private=True)
    identity = api.whoami()
    seen = {"whoami": [identity["name"], [organization["name"] for organization in identity["orgs"]]]}
    seen["foreign namespace"] = status_of(api.create_repo, "somebody/else")
    for name, token in {"none": False, "wrong": "hf_wrong", "read": read_token, "write": None}.items():
        seen[name] = {
            "whoami": status_of(api.whoami, token=token) if name != "none" else None,
            "read public": status_of(api.model_info, "org/public", token=token),
            "read private": status_of(api.model_info, "org/private", token=token),
            "create": status_of(api.create_repo, f"org/by-{name}", token=token),
            "upload": status_of(
                api.upload_file, repo_id="org/public", path_or_fileobj=b"x", path_in_repo="x", token=token
            ),
            "branch": status_of(api.create_branch, "org/public", branch=f"by-{name}", token=token),
            "delete": status_of(api.delete_repo, "org/public", token=token),
        }
    return seen


def test_tokens_decide_who_reads_and_who_writes(hub, tmp_path):
    seen = hub.call(client_tokens, tmp_path, hub.read_token)
    assert seen["whoami"] == ["tester", ["org"]]
    assert seen["foreign namespace"] == 403
    calls = ["whoami", "read public", "read private", "create", "upload", "branch", "delete"]
    assert [seen["none"][call] for call in calls] == [None, 200, 401, 401, 401, 401, 401]
    assert [seen["wrong"][call] for call in calls] == [401] * 7
    assert [seen["read"][call] for call in calls] == [200, 200, 200, 403, 403, 403, 403]
    assert [seen["write"][call] for call in calls] == [200] * 7


# ---- huggingface_hub: uploads that fail


def client_failed_uploads() -> dict:
    from unittest.mock import patch

    from huggingface_hub import CommitOperationAdd, HfApi

    api, seen = HfApi(), {}
    api.create_repo("org/failures")

    def upload(data, **wrong):
        operation = CommitOperationAdd("w.safetensors", data)
        for name, value in wrong.items():
            setattr(operation.upload_info, name, value)
        try:
            with patch("time.sleep"):  # Between attempts the client waits for seconds, which are not the test.
                api.create_commit("org/failures", [operation], commit_message="upload")
        except RuntimeError as error:
            return error.__cause__.response.status_code
        return "committed"

    seen["retried"] = upload(b"\0weights")
    seen["wrong sha256"] = upload(b"\0other weights", sha256=bytes(32))
    seen["wrong size"] = upload(b"\0more weights", size=1000)
    seen["commits"] = [commit.title for commit in api.list_repo_commits("org/failures")]
    return seen


def test_a_failed_upload_is_retried_and_a_damaged_one_refused(hub, tmp_path):
    hub.fail_next("PUT", times=2, status=500)
    seen = hub.call(client_failed_uploads, tmp_path)
    assert seen["retried"] == "committed"
    assert (seen["wrong sha256"], seen["wrong size"]) == (400, 400)
    assert seen["commits"] == ["upload", "initial commit"]
    assert hub.files("org/failures")["w.safetensors"] == b"\0weights"
    assert [status for method, _, status in hub.requests if method == "PUT"][-5:] == [500, 500, 200, 400, 400]


# ---- datasets


def client_dataset() -> dict:
    from datasets import Dataset, load_dataset
    from huggingface_hub import HfApi

    clouds = [[[float(cloud), 0.25, -1.0], [1.0, 2.0, 3.0]] for cloud in range(5)]
    Dataset.from_dict({"points": clouds, "label": list(range(5))}).push_to_hub("org/pc")
    loaded = load_dataset("org/pc", split="train")
    streamed = load_dataset("org/pc", split="train", streaming=True)
    return {
        "loaded": loaded["points"][:] == clouds,
        "streamed": [example["label"] for example in streamed],
        "files": sorted(HfApi().list_repo_files("org/pc", repo_type="dataset")),
    }


def test_a_dataset_is_pushed_loaded_and_streamed(hub, tmp_path):
    seen = hub.call(client_dataset, tmp_path)
    assert seen["loaded"]
    assert seen["streamed"] == list(range(5))
    assert seen["files"] == [".gitattributes", "README.md", "data/train-00000-of-00001.parquet"]
    statuses = [status for method, path, status in hub.requests if method == "GET" and path.endswith(".parquet")]
    assert set(statuses) == {200, 206}


# ---- transformers


def client_transformers() -> dict:
    import torch
    from transformers import (
        AutoImageProcessor,
        AutoModelForPreTraining,
        ViTImageProcessor,
        ViTMAEConfig,
        ViTMAEForPreTraining,
    )

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    decoder = {f"decoder_{name}": size for name, size in sizes.items()}
    model = ViTMAEForPreTraining(ViTMAEConfig(**sizes, **decoder, image_size=8, patch_size=4))
    model.push_to_hub("org/vitmae")
    ViTImageProcessor(size={"height": 8, "width": 8}).push_to_hub("org/vitmae")
    loaded = AutoModelForPreTraining.from_pretrained("org/vitmae", revision="main")
    weights = loaded.state_dict()
    return {
        "class": type(loaded).__name__,
        "equal": all(torch.equal(value, weights[name]) for name, value in model.state_dict().items()),
        "size": AutoImageProcessor.from_pretrained("org/vitmae").size["height"],
    }


def test_a_transformers_model_and_its_processor_come_back_equal(hub, tmp_path):
    assert hub.call(client_transformers, tmp_path) == {"class": "ViTMAEForPreTraining", "equal": True, "size": 8}


# ---- Plain HTTP


def send(hub: HubServer, method: str, path: str, body: bytes | dict | None = None, **headers: str):
    """The status, headers and body of the reply; names of headers are written with underscores."""
    connection = http.client.HTTPConnection("127.0.0.1", int(hub.url.rsplit(":", 1)[1]))
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    named.setdefault("Authorization", f"Bearer {hub.token}")
    connection.request(method, path, json.dumps(body) if isinstance(body, dict) else body, named)
    response = connection.getresponse()
    answer = response.status, response.headers, response.read()
    connection.close()
    return answer


def commit(hub: HubServer, repo_id: str, *operations: tuple[str, dict], **header: str) -> int:
    """Sends a commit on main and returns the status of the reply."""
    lines = [("header", {"summary": "commit", **header}), *operations]
    body = b"".join(json.dumps({"key": key, "value": value}).encode() + b"\n" for key, value in lines)
    return send(hub, "POST", f"/api/models/{repo_id}/commit/main", body)[0]


def regular_file(path: str, data: bytes) -> tuple[str, dict]:
    return "file", {"path": path, "content": base64.b64encode(data).decode(), "encoding": "base64"}


def lfs_file(path: str, data: bytes) -> tuple[str, dict]:
    return "lfsFile", {"path": path, "algo": "sha256", "oid": hashlib.sha256(data).hexdigest(), "size": len(data)}


@pytest.fixture
def repo_id(hub):
    name = f"repository-{len(hub.repositories)}"
    assert send(hub, "POST", "/api/repos/create", {"name": name, "organization": "org"})[0] == 200
    return f"org/{name}"


def announce(hub: HubServer, repo_id: str, data: bytes) -> str:
    oid = hashlib.sha256(data).hexdigest()
    objects = {"objects": [{"oid": oid, "size": len(data)}]}
    assert send(hub, "POST", f"/{repo_id}.git/info/lfs/objects/batch", objects)[0] == 200
    return oid


def test_an_upload_that_breaks_off_leaves_nothing(hub, repo_id):
    data = b"sent in two parts" * 100
    oid = announce(hub, repo_id, data)
    with socket.create_connection(("127.0.0.1", int(hub.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(f"PUT /_lfs/{oid} HTTP/1.1\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data[:100])
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""  # No reply: the hub gave up on the request.
    both = regular_file("a.txt", b"a"), lfs_file("w.safetensors", data)
    assert commit(hub, repo_id, *both) == 400
    assert list(hub.files(repo_id)) == [".gitattributes"]
    assert send(hub, "PUT", f"/_lfs/{oid}", data)[0] == 200
    assert commit(hub, repo_id, *both) == 200
    assert hub.files(repo_id)["w.safetensors"] == data


def test_an_upload_must_be_announced_by_someone_who_may_write(hub):
    oid = hashlib.sha256(b"unannounced").hexdigest()
    assert send(hub, "PUT", f"/_lfs/{oid}", b"unannounced")[0] == 403


@pytest.mark.parametrize(
    ("operation", "status"),
    [
        (("file", {"path": "b.txt", "content": "not base64"}), 400),
        (("file", {"path": "b.txt"}), 400),
        (regular_file("../b.txt", b"b"), 400),
        (regular_file(".git/config", b"b"), 400),
        (("deletedFile", {"path": "b.txt"}), 404),
        (("deletedFolder", {"path": "b/"}), 404),
        (("rename", {"path": "b.txt"}), 400),
    ],
)
def test_a_commit_with_one_bad_operation_changes_nothing(hub, repo_id, operation, status):
    assert commit(hub, repo_id, regular_file("a.txt", b"a"), operation) == status
    assert list(hub.files(repo_id)) == [".gitattributes"]


def test_a_commit_on_an_outdated_parent_is_refused(hub, repo_id):
    parent = hub.repository(repo_id).resolve("main").sha
    assert commit(hub, repo_id, regular_file("a.txt", b"a"), parentCommit=parent) == 200
    assert commit(hub, repo_id, regular_file("a.txt", b"b"), parentCommit=parent) == 412
    assert hub.files(repo_id)["a.txt"] == b"a"


@pytest.fixture
def eager_threads():
    """Threads take turns so often that two of them do meet in the same few lines."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_commits_sent_at_once_all_arrive(hub, repo_id, eager_threads):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: commit(hub, repo_id, regular_file(f"{i}.txt", b"")), range(48)))
    repository = hub.repository(repo_id)
    assert len(repository.history(repository.resolve("main"))) == 49
    assert len(hub.files(repo_id)) == 49


def test_a_folder_is_deleted_with_all_it_holds(hub, repo_id):
    commit(hub, repo_id, *[regular_file(path, b"") for path in ("logs/a", "logs/b/c", "logs.txt")])
    assert commit(hub, repo_id, ("deletedFolder", {"path": "logs/"})) == 200
    assert sorted(hub.files(repo_id)) == [".gitattributes", "logs.txt"]


@pytest.mark.parametrize(
    ("asked", "status", "content_range", "body"),
    [
        ("bytes=0-3", 206, "bytes 0-3/10", b"0123"),
        ("bytes=7-", 206, "bytes 7-9/10", b"789"),
        ("bytes=7-99", 206, "bytes 7-9/10", b"789"),
        ("bytes=-4", 206, "bytes 6-9/10", b"6789"),
        ("bytes=10-", 416, "bytes */10", None),
        ("lines=1-2", 200, None, b"0123456789"),
    ],
)
def test_parts_of_a_file_can_be_asked_for(hub, repo_id, asked, status, content_range, body):
    commit(hub, repo_id, regular_file("digits.txt", b"0123456789"))
    answer = send(hub, "GET", f"/{repo_id}/resolve/main/digits.txt", Range=asked)
    assert (answer[0], answer[1].get("Content-Range")) == (status, content_range)
    assert body is None or answer[2] == body


def test_the_head_of_a_file_says_what_the_cache_needs(hub, repo_id):
    oid = announce(hub, repo_id, WEIGHTS)
    send(hub, "PUT", f"/_lfs/{oid}", WEIGHTS)
    commit(hub, repo_id, regular_file("a.txt", b"a"), lfs_file("w.safetensors", WEIGHTS))
    sha = hub.repository(repo_id).resolve("main").sha

    status, headers, body = send(hub, "HEAD", f"/{repo_id}/resolve/main/w.safetensors")
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(WEIGHTS)))
    assert (headers["X-Linked-ETag"], headers["X-Linked-Size"]) == (f'"{oid}"', str(len(WEIGHTS)))
    assert headers["X-Repo-Commit"] == sha

    status, headers, _ = send(hub, "HEAD", f"/{repo_id}/resolve/main/a.txt")
    assert headers["ETag"] == '"2e65efe2a145dda7ee51d1741299f848e5bf752e"'  # As `git hash-object` says.
    assert "X-Linked-ETag" not in headers

    status, headers, _ = send(hub, "HEAD", f"/{repo_id}/resolve/main/nope")
    assert (status, headers["X-Error-Code"], headers["X-Repo-Commit"]) == (404, "EntryNotFound", sha)


def test_a_card_must_close_its_metadata(hub):
    assert send(hub, "POST", "/api/validate-yaml", {"content": "---\nlicense: mit\n---\n"})[0] == 200
    assert send(hub, "POST", "/api/validate-yaml", {"content": "---\nlicense: mit\n"})[0] == 400


def test_injected_failures_hit_the_named_requests_only(hub, repo_id):
    hub.fail_next("GET", status=503, path="refs$")
    assert send(hub, "GET", f"/api/models/{repo_id}")[0] == 200
    assert [send(hub, "GET", f"/api/models/{repo_id}/refs")[0] for _ in range(2)] == [503, 200]
    hub.fail_next("GET", times=99)
    hub.clear_faults()
    assert send(hub, "GET", f"/api/models/{repo_id}")[0] == 200


def test_a_call_that_the_hub_does_not_know_says_so(hub):
    status, _, body = send(hub, "GET", "/api/spaces/org/demo")
    assert status == 501 and b"/api/spaces/org/demo" in body
