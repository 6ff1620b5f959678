"""A model's name leads to its file: from the hub, once, whole, and with what describes it."""

import hashlib
import http.server
import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from oracle import assert_holds, assert_one_line_error, convert
from safetensors.torch import save_file

from clip_min import CONFIGS, UserError, formats, hub, load, weights

REPO, REVISION, _ = hub.HUB["ViT-B/16"]


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as its client asks for files."""

    files: dict[str, bytes] = {}
    cuts: list[int] = []  # after so many bytes, the next downloads break off
    refusal: tuple[int, str] | None = None  # status and error code of everything
    repos: tuple[str, ...] = (REPO,)  # those that are there
    asked: list[str] = []

    def do_GET(self):
        body = self.answer()
        cut = self.cuts.pop(0) if body and self.cuts else None
        self.wfile.write(body[:cut])

    def do_HEAD(self):
        self.answer()

    def answer(self) -> bytes:
        """Send status and headers -> the body that belongs to them."""
        start = self.headers.get("Range", "")
        self.asked.append(f"{self.command} {self.path} {start}".strip())
        body = self.files.get(self.path)
        status, code = (200, "") if body is not None else (404, "EntryNotFound")
        if not self.path.startswith(tuple(f"/{repo}/" for repo in self.repos)):
            status, code = 404, "RepoNotFound"
        elif "/resolve/nosuch/" in self.path:
            status, code = 404, "RevisionNotFound"
        if self.refusal:
            status, code = self.refusal
        if status != 200:
            body = b""
        whole = body
        if start and self.command == "GET":
            status, body = 206, whole[int(start.removeprefix("bytes=").split("-")[0]) :]
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("ETag", f'"{hashlib.sha256(whole).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("Content-Length", str(len(body)))
        if status == 206:
            first = len(whole) - len(body)
            self.send_header("Content-Range", f"bytes {first}-{len(whole) - 1}/{len(whole)}")
        self.end_headers()
        return body

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, theirs, tmp_path):
    """A server that has ViT-B/16's file, in which is the small CLIP."""
    save_file(theirs.state_dict(), tmp_path / "served.safetensors")
    address = f"/{REPO}/resolve/{REVISION}/{hub.HUB_FILE}"
    content = (tmp_path / "served.safetensors").read_bytes()
    monkeypatch.setattr(Hub, "files", {address: content})
    for name, value in {"asked": [], "cuts": [], "refusal": None, "repos": (REPO,)}.items():
        monkeypatch.setattr(Hub, name, value)
    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    serving.url = f"http://127.0.0.1:{serving.server_port}"
    serving.sha256 = hashlib.sha256(content).hexdigest()
    yield serving
    serving.shutdown()
    serving.server_close()


@pytest.fixture
def fetch(server, monkeypatch, tmp_path, capsys):
    """(name, endpoint) -> the command on a name, against that server and a cache of its own.

    In this process, since each new one takes seconds: what the client reads from the environment
    is set where it keeps it.
    """
    import huggingface_hub.constants as client

    monkeypatch.setitem(hub.HUB, "ViT-B/16", (REPO, REVISION, server.sha256))
    monkeypatch.setattr(client, "HF_HUB_CACHE", str(tmp_path / "home"))

    def run(name: str = "ViT-B/16", endpoint: str = server.url) -> SimpleNamespace:
        monkeypatch.setattr(client, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            client,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        (tmp_path / "out.safetensors").unlink(missing_ok=True)
        code = weights.main(["convert", name, str(tmp_path / "out.safetensors")])
        said = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    return run


def test_a_name_is_downloaded_once_with_progress_and_then_needs_no_network(
    root, server, state, tmp_path
):
    """In a process and a terminal of its own, as a user would."""
    import fcntl
    import pty
    import termios

    program = (
        "import sys; from clip_min import hub, weights; "
        f"hub.HUB['ViT-B/16'] = {(REPO, REVISION, server.sha256)}; "
        "sys.exit(weights.main(['convert', 'ViT-B/16', sys.argv[1]]))"
    )
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    environment |= {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    out, (terminal, its_end) = tmp_path / "out.safetensors", pty.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # rows, columns
    command = [sys.executable, "-c", program, str(out)]
    assert subprocess.run(command, cwd=root, env=environment, stderr=its_end).returncode == 0
    shown = os.read(terminal, 65536).decode()
    assert hub.HUB_FILE in shown
    assert "100%" in shown
    assert_holds(load(out), state)
    assert len([line for line in Hub.asked if line.startswith(f"GET /{REPO}/")]) == 1

    Hub.asked.clear()
    out.unlink()
    again = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert (again.returncode, again.stderr, Hub.asked) == (0, "", [])
    assert_holds(load(out), state)


def test_what_is_cached_needs_no_hub(fetch, state, tmp_path):
    assert fetch().returncode == 0
    result = fetch(endpoint="http://127.0.0.1:9")
    assert (result.returncode, result.stderr) == (0, "")
    assert_holds(load(tmp_path / "out.safetensors"), state)


def test_a_download_that_is_interrupted_goes_on_where_it_was(fetch, state, tmp_path, monkeypatch):
    # The client keeps whole chunks, of 10 MB, which is more than the small CLIP's file.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50_000)
    Hub.cuts += [120_000, 200_000]
    result = fetch()
    assert result.returncode == 0, result.stderr
    assert_holds(load(tmp_path / "out.safetensors"), state)
    parts = [line.split()[2:] for line in Hub.asked if line.startswith("GET")]
    assert parts == [[], ["bytes=100000-"], ["bytes=300000-"]]


def test_a_file_that_the_hub_does_not_have_is_one_line(fetch, tmp_path):
    result = fetch("ViT-B/32")
    assert_one_line_error(result, "ViT-B/32", "vit_base_patch32_clip_224.openai", "404")
    assert any("vit_base_patch32" in line for line in Hub.asked)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "refusal", [(401, "RepoNotFound"), (401, "GatedRepo"), (403, "GatedRepo"), (403, "")]
)
def test_a_hub_that_wants_to_know_who_asks_is_one_line(refusal, fetch, monkeypatch, tmp_path):
    monkeypatch.setattr(Hub, "refusal", refusal)
    result = fetch()
    said = (f"ViT-B/16: {REPO}", str(refusal[0]), "hf auth login", "--model path/to/ViT-B-16.pt")
    assert_one_line_error(result, *said)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_hub_that_does_not_answer_is_one_line_at_once(fetch, tmp_path):
    """Nothing listens there. That the client does not try again shows in its silence."""
    result = fetch(endpoint="http://127.0.0.1:9")
    assert_one_line_error(
        result, "ViT-B/16", "cannot be reached", "ViT-B-16.pt; to try things", "--model demo"
    )


def test_a_file_that_is_not_the_published_one_is_one_line_and_never_used(
    fetch, server, state, tmp_path
):
    (address,) = Hub.files
    spoiled = bytearray(Hub.files[address])
    spoiled[-1] ^= 1
    good, Hub.files[address] = Hub.files[address], bytes(spoiled)
    found = hashlib.sha256(spoiled).hexdigest()
    for _ in range(2):  # downloaded, and from the cache
        result = fetch()
        assert result.returncode == 2
        last = result.stderr.splitlines()[-1]
        assert last.startswith(f"error: {tmp_path / 'home'}")
        assert f"sha256 is {found[:16]}…, but {REPO} has {server.sha256[:16]}…; delete" in last
        assert not (tmp_path / "out.safetensors").exists()
    Path(last.removeprefix("error: ").split(": sha256")[0]).unlink()  # as it says
    Hub.files[address] = good
    assert fetch().returncode == 0
    assert_holds(load(tmp_path / "out.safetensors"), state)


def test_offline_and_not_cached_is_one_line(root, tmp_path):
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    result = convert(root, "ViT-L/14@336px", tmp_path / "out.safetensors", **environment)
    assert_one_line_error(result, "ViT-L/14@336px", "cache", "--model path/to/ViT-L-14-336px.pt")


def test_revisions_and_checksums_are_whole():
    for name, (repo, revision, sha256) in hub.HUB.items():
        assert name in CONFIGS
        assert repo.startswith("timm/vit_")
        assert len(bytes.fromhex(revision)) == 20
        assert len(bytes.fromhex(sha256)) == 32


@pytest.mark.slow
def test_a_cache_that_cannot_be_used_is_one_line(fetch, tmp_path):
    (tmp_path / "home").write_text("a file where the cache should be")
    result = fetch()
    assert_one_line_error(result, "ViT-B/16", str(tmp_path / "home"))


@pytest.mark.slow  # the hub's client tries again for some seconds, and says so
def test_a_download_that_always_breaks_off_ends_in_one_line_of_ours(fetch):
    Hub.cuts += 100 * [0]
    result = fetch()
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ViT-B/16: ")


# ------------------------------------------------------------------------- any repository, by name

OTHER = "laion/CLIP-ViT-S-16-drawn"


@pytest.fixture
def publish(server, monkeypatch):
    """Put the files of a folder into a repository of that server's."""

    def put(folder: Path, repo: str = OTHER, revision: str = "main") -> None:
        monkeypatch.setattr(Hub, "repos", (*Hub.repos, repo))
        for file in folder.iterdir():
            Hub.files[f"/{repo}/resolve/{revision}/{file.name}"] = file.read_bytes()

    return put


def asked() -> set[str]:
    """The files that were asked for since the last call."""
    files = {line.split()[1].split("/")[-1] for line in Hub.asked if "/resolve/" in line}
    Hub.asked.clear()
    return files


@pytest.mark.parametrize("save_folder", [formats.save_hugging_face, formats.save_open_clip])
@pytest.mark.parametrize("revision", ["", "@v1.0"])
def test_a_repository_is_read_as_its_folder_and_then_from_the_cache(
    save_folder, revision, publish, fetch, tmp_path
):
    demo = load("demo")  # whose heads are 32 wide, as no tensor tells
    save_folder(demo, tmp_path / "folder")
    publish(tmp_path / "folder", revision=revision[1:] or "main")
    result = fetch(OTHER + revision)
    assert (result.returncode, "note:" in result.stdout) == (0, False), result.stderr
    out = load(tmp_path / "out.safetensors")
    assert out.config == demo.config
    assert_holds(out, demo.state_dict())
    assert {"open_clip_config.json", "config.json"} < asked()
    assert fetch(OTHER + revision, endpoint="http://127.0.0.1:9").returncode == 0
    assert_holds(load(tmp_path / "out.safetensors"), demo.state_dict())
    assert asked() == set()


def test_what_another_library_left_out_of_the_cache_is_fetched(publish, fetch, server, tmp_path):
    """CLIPModel.from_pretrained fetches no preprocessing."""
    from huggingface_hub import hf_hub_download

    formats.save_hugging_face(load("demo"), tmp_path / "folder")
    told = tmp_path / "folder/preprocessor_config.json"
    told.write_text(json.dumps(json.loads(told.read_text()) | {"image_mean": [0.5, 0.4, 0.3]}))
    publish(tmp_path / "folder")
    fetch("nobody/nothing")  # which sets the client to this server
    for file in ("config.json", "model.safetensors"):
        hf_hub_download(OTHER, file)
    assert fetch(OTHER, endpoint="http://127.0.0.1:9").returncode == 0  # what is there must do
    assert load(tmp_path / "out.safetensors").config.mean != (0.5, 0.4, 0.3)
    for endpoint in (server.url, "http://127.0.0.1:9"):
        assert fetch(OTHER, endpoint).returncode == 0
        assert load(tmp_path / "out.safetensors").config.mean == (0.5, 0.4, 0.3)


@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "model.safetensors"])
def test_the_description_that_belongs_to_the_weights_decides(weights, publish, fetch, tmp_path):
    formats.save_open_clip(load("demo"), tmp_path / "folder")
    (tmp_path / "folder/open_clip_model.safetensors").rename(tmp_path / "folder" / weights)
    other = {"model_type": "another", "vision_config": {}}
    (tmp_path / "folder/config.json").write_text(json.dumps(other))
    publish(tmp_path / "folder")
    result = fetch(OTHER)
    if weights == "model.safetensors":
        assert_one_line_error(result, f"{OTHER}: ", "model_type is 'another'")
        assert weights not in asked()
        return
    assert result.returncode == 0, result.stderr
    assert load(tmp_path / "out.safetensors").config == CONFIGS["demo"]


@pytest.mark.parametrize("answer", [401, 429, 500])
def test_a_hub_that_refuses_does_not_matter_if_the_weights_are_there(
    answer, publish, fetch, server, tmp_path, monkeypatch
):
    from huggingface_hub import hf_hub_download

    formats.save_hugging_face(load("demo"), tmp_path / "folder")
    publish(tmp_path / "folder")
    fetch("nobody/nothing")  # which sets the client to this server
    for file in ("config.json", "model.safetensors"):
        hf_hub_download(OTHER, file)

    def refuse(self):
        self.send_response(answer)
        self.send_header("Content-Length", "0")
        self.end_headers()

    monkeypatch.setattr(Hub, "do_HEAD", refuse)
    monkeypatch.setattr(Hub, "do_GET", refuse)
    result = fetch(OTHER)
    assert result.returncode == 0, result.stderr


def test_safetensors_come_first_else_a_bin_file(publish, fetch, theirs, state, tmp_path):
    (tmp_path / "folder").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "folder" / "open_clip_pytorch_model.bin")
    publish(tmp_path / "folder")
    assert fetch(OTHER).returncode == 0
    assert_holds(load(tmp_path / "out.safetensors"), state)
    beside = {"open_clip_config.json", "config.json", "processor_config.json"}
    assert asked() == {*hub.IN_FOLDERS[:3], *beside, "preprocessor_config.json"}
    (tmp_path / "folder" / "model.safetensors").write_bytes(b"no safetensors")
    publish(tmp_path / "folder", "laion/both")
    assert_one_line_error(fetch("laion/both"), "not a complete safetensors file")


@pytest.mark.parametrize("model", ["ViT-B-16-SigLIP", "EVA02-B-16", "RN50", "ViT-bigG-14"])
def test_another_architecture_is_refused_before_its_weights_are_fetched(
    model, publish, fetch, tmp_path
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "open_clip_model.safetensors").write_bytes(b"")
    told = json.dumps({"model_cfg": open_clip.get_model_config(model)})
    (tmp_path / "folder" / "open_clip_config.json").write_text(told)
    publish(tmp_path / "folder")
    assert_one_line_error(fetch(OTHER), f"{OTHER}: ", "another architecture")
    assert "open_clip_model.safetensors" not in asked()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("laion/none", ["there is no such file, folder or repository", "404"]),
        (f"{REPO}@nosuch", ["404", "nosuch"]),
        (f"{REPO}@v2", ["has no open_clip_model.safetensors or model.safetensors or", "(404)"]),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(name, parts, fetch):
    assert_one_line_error(fetch(name), f"{name}: {name.split('@')[0]}", *parts)


@pytest.mark.parametrize(
    ("refusal", "said"),
    [((401, "RepoNotFound"), "private"), ((403, "GatedRepo"), "accept its owners' terms")],
)
def test_a_repository_that_is_not_for_everyone_is_one_line(refusal, said, fetch, monkeypatch):
    monkeypatch.setattr(Hub, "refusal", refusal)
    result = fetch(OTHER)
    assert_one_line_error(result, OTHER, str(refusal[0]), said, "`hf auth login`")


def test_a_repository_that_is_not_cached_needs_the_hub(fetch):
    result = fetch(OTHER, endpoint="http://127.0.0.1:9")
    assert_one_line_error(
        result, f"{OTHER}: there is no such file or folder here", "connect to the internet once"
    )


def test_a_name_is_seen_to_be_possible_without_asking_anyone(tmp_path):
    for name in (OTHER, f"{OTHER}@0123abcd", "timm/vit_base_patch16_clip_224.openai", *hub.HUB):
        assert hub.local(name) is None
    for name in (
        "ViT-B/61",
        "laion",
        "laion/a/b",
        "laion/model.bin",
        "../a",
        "laion/",
        str(tmp_path),
    ):
        with pytest.raises(UserError, match="give demo, ViT-B/32"):
            hub.local(name)


def test_the_table_of_known_models_is_whole_and_has_nothing_made_up(capsys):
    assert weights.main(["list"]) == 0
    said = capsys.readouterr().out
    names = [known.name for known in hub.KNOWN]
    assert len({*names}) == len(names)
    assert names[:4] == list(hub.HUB)
    for known in hub.KNOWN:
        assert hub.local(known.name) is None
        assert known.size in CONFIGS
        assert f"\n{known.name} " in said
    # What open_clip itself knows of them: the activation, by repository.
    from open_clip.pretrained import _PRETRAINED

    quick = {
        entry["hf_hub"].rstrip("/"): bool(entry.get("quick_gelu"))
        for tags in _PRETRAINED.values()
        for entry in tags.values()
        if entry.get("hf_hub")
    }
    for known in hub.KNOWN:
        repo = hub.HUB[known.name][0] if known.name in hub.HUB else known.name
        assert quick[repo] == (known.activation == "quick_gelu"), repo


def test_the_page_on_models_has_the_same_table(root):
    page = (root / "docs" / "models.md").read_text().splitlines()
    for known in hub.KNOWN:
        figures = f"{known.flowers:.2f} | {known.imagenet:.2f} |"
        row = f"| `{known.name}` | {known.size} | {known.activation} | {known.licence} | {figures}"
        assert row in page
