"""What a stranger's file, and a secret of one's own, must not do.  The wire is in test_security_wire.py (marked W).

==================================================  ==========================================================================================
clause                                              held by
==================================================  ==========================================================================================
safetensors and JSON only, nothing is unpickled     test_no_line_of_the_source_unpickles_evaluates_or_opens_a_shell, test_weights_come_from_
                                                    safetensors_files_of_the_folder_alone; unit/test_engine_checkpoint: nothing_in_a_checkpoint_is_
                                                    pickled; unit/test_adapters_files: damaged_and_missing_files_are_named; unit/test_models_loading:
                                                    a_folder_that_is_not_a_model_says_what_it_lacks
trust_remote_code is off, and no option turns it    test_code_beside_a_model_is_not_run, test_nothing_can_ask_for_a_strangers_code (so no model card
on                                                  has a use of it to name)
yaml: safe, bounded, no key twice                   unit/test_config_load: text_that_is_no_recipe_is_refused_in_one_line (bombs, tags, depth, size),
                                                    a_duplicate_key_names_both_places; test_a_bomb_in_a_distillkit_folder_is_refused
no path of a file or a request leaves its folder    test_a_name_in_a_manifest_stays_in_its_folder, test_names_of_stages_and_runs_are_names,
                                                    test_a_link_out_of_a_folder_is_not_copied, test_a_link_is_replaced_and_not_followed, test_
                                                    folders_of_adapters_are_named_by_what_is_safe; served names: W a_model_of_another_name_opens_no_file
secrets from the environment alone, shown nowhere   test_a_run_leaves_no_secret_behind, test_a_secret_in_a_recipe_is_refused_and_not_repeated, test_a_
                                                    url_keeps_its_variables_wherever_it_is_written, W what_a_server_says_back_is_struck_out, W the_
                                                    library_of_the_client_logs_no_secret; integration/test_http_teacher: a_token_comes_from_the_
                                                    environment_and_is_never_shown, a_name_and_password_in_the_url_are_not_shown; integration/
                                                    test_teach_server: without_the_token_only_the_root_answers
servers bind to loopback                            W an_address_that_others_reach_wants_a_token, W servers_listen_on_this_machine_alone_by_default
tokens in constant time, on every route             W tokens_are_compared_in_constant_time, W every_route_but_the_open_ones_wants_the_token
bodies, contexts, concurrency and time are bounded  W a_body_is_counted_as_it_comes, W a_head_that_never_ends_is_given_up; integration/test_teach_server:
                                                    too_much_is_refused_with_the_limit_and_the_way_out, a_sequence_beyond_the_context_is_refused,
                                                    a_full_queue_says_when_to_come_again, a_body_that_never_ends_is_given_up; integration/test_serve_
                                                    answers: more_than_the_queue_is_told_to_come_again; unit/test_serve_openai: what_is_wrong_is_
                                                    said_by_field, a_body_of_any_depth_is_an_answer_or_a_refusal
no stack is echoed                                  W a_failure_tells_the_client_no_stack; unit/test_cli: errors_of_people_end_with_code_2_and_no_traceback
URLs as given, redirects refused, no proxy          W a_url_is_used_as_it_is_given, W a_redirect_is_told_and_not_followed, W a_proxy_is_no_way_to_this_
                                                    machine
answers are bounded                                 W a_small_answer_that_unpacks_to_a_large_one_is_left, W what_was_not_asked_for_is_not_unpacked
archives are never unpacked                         test_no_line_of_the_source_unpickles_evaluates_or_opens_a_shell
==================================================  ==========================================================================================
"""

from __future__ import annotations

import ast
import json
import pickle
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import limbeck
import stub_teachers
from limbeck.adapters.delta_store import DeltaCache
from limbeck.adapters.pool import read_pool
from limbeck.cli.app import app
from limbeck.config.load import load_text, resolved
from limbeck.config.parts.teachers import HttpTeacherOptions
from limbeck.errors import AdapterError, CheckpointError, DataError, LimbeckError, ModelError, RecipeError, TeacherError
from limbeck.files import damage, put_in_place
from limbeck.models.loading import check_folder, copy_tokenizer, load_config, load_model, load_tokenizer
from limbeck.report.run import read_run
from limbeck.stages.run import grid_cells, open_stage
from limbeck.stages.train_adapters import safe
from limbeck.teachers.store.distillkit import Compression
from limbeck.teachers.store.manifest import Identity, Manifest, ShardInfo, read_manifest, write_manifest
from stub_teachers import StubTeacher, served

SOURCE = Path(limbeck.__file__).parent
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "tarfile", "zipfile"}
CALLS = {
    "eval", "exec", "__import__", "os.system", "os.popen", "torch.hub.load", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all",
    "shutil.unpack_archive", "dist.all_gather_object", "dist.gather_object", "dist.broadcast_object_list", "subprocess.getoutput",
}  # fmt: skip
ALLOWED = {("config/plugins.py", "exec"): 1}
"""A recipe names its own plug-ins: files of its writer, run as the recipe is."""


def crimes(tree: ast.AST) -> list[str]:
    """What in a module unpickles, evaluates, unpacks, opens a shell or trusts a stranger's code."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in PICKLERS]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        loads = name.rpartition(".")[2]
        if name in CALLS or loads in ("extractall", "allow_code"):
            found.append(name)
        elif name == "torch.load" and given.get("weights_only") != "True":
            found.append("torch.load")
        elif name in ("yaml.load", "yaml.load_all") and "SafeLoader" not in ast.unparse(node):
            found.append(name)
        elif given.get("allow_pickle", "False") != "False" or given.get("shell", "False") != "False":
            found.append(f"{name}: allow_pickle or shell")
        elif given.get("trust_remote_code", "False") != "False":
            found.append(f"{name}: trust_remote_code")
        elif loads == "from_pretrained" and name.startswith("Auto") and given.get("trust_remote_code") != "False":
            found.append(f"{name} without trust_remote_code=False")
    return found


def test_no_line_of_the_source_unpickles_evaluates_or_opens_a_shell() -> None:
    found: dict[tuple[str, str], int] = {}
    files = sorted(SOURCE.rglob("*.py"))
    for path in files:
        for crime in crimes(ast.parse(path.read_text(encoding="utf-8"))):
            key = (path.relative_to(SOURCE).as_posix(), crime)
            found[key] = found.get(key, 0) + 1
    assert len(files) > 200 and found == ALLOWED


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from dill import loads", "import tarfile", "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)",
        "np.load(p, allow_pickle=flag)", "yaml.load(t)", "yaml.load(t, Loader=yaml.Loader)", "eval(t)", "exec(t)", "os.system(t)",
        "subprocess.run(t, shell=True)", "archive.extractall()", "shutil.unpack_archive(p)", "AutoModel.from_pretrained(p)",
        "AutoConfig.from_pretrained(p, trust_remote_code=True)", "load_dataset(p, trust_remote_code=options.trust)",
    ],
)  # fmt: skip
def test_the_search_for_such_lines_finds_them(line: str) -> None:
    assert crimes(ast.parse(line))


def test_nothing_can_ask_for_a_strangers_code() -> None:
    schema = CliRunner().invoke(app, ["schema"])
    assert schema.exit_code == 0 and '"revision"' in schema.output and "trust_remote_code" not in schema.output


CODE = "from pathlib import Path\nPath({!r}).write_text('run')\nclass Stranger: pass\n"


def test_code_beside_a_model_is_not_run(tmp_path: Path) -> None:
    ran, folder = tmp_path / "ran", tmp_path / "model"
    folder.mkdir()
    (folder / "stranger.py").write_text(CODE.format(str(ran)))
    named = {"AutoConfig": "stranger.Stranger", "AutoModelForCausalLM": "stranger.Stranger", "AutoTokenizer": ["stranger.Stranger", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "stranger", "auto_map": named}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Stranger", "auto_map": named}))
    (folder / "model.safetensors").write_bytes(b"")
    for load in (load_config, load_model, load_tokenizer):
        with pytest.raises(LimbeckError):
            load(str(folder))
    assert not ran.exists()


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["payload.bin", "../outside.safetensors", "/tmp/outside.safetensors", "a/../../outside.safetensors", "..\\x.safetensors", 3])
@pytest.mark.parametrize("where", ["weight_map", "transformers_weights"])
def test_weights_come_from_safetensors_files_of_the_folder_alone(name: Any, where: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "payload.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    (folder / "other.safetensors").write_bytes(b"")
    config: dict[str, Any] = {"model_type": "llama"}
    if where == "transformers_weights":
        config[where] = name
    else:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}}))
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"{where} names .* in the same folder"):
        load_model(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_model_folder_does_not_name_another_model_to_load(tmp_path: Path) -> None:
    for name, text in (("config.json", '{"model_type": "llama"}'), ("model.safetensors", ""), ("adapter_config.json", '{"base_model_name_or_path": "x/y"}')):
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=r"adapter_config\.json beside its weights"):
        check_folder(str(tmp_path))


def test_a_run_directory_brings_no_plug_in_of_its_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "stage").mkdir(parents=True)
    (run / "plugin.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (run / "recipe.json").write_text(json.dumps({"name": "x", "plugins": ["plugin.py"], "stages": {}}))
    (run / "environment.json").write_text(json.dumps({"recipe_dir": str(run)}))
    with pytest.raises(LimbeckError, match=r"inside the run directory \(plugin.py\)"):
        open_stage(run / "stage")
    assert not (tmp_path / "ran").exists()


def test_a_bomb_in_a_distillkit_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "compression_config.yaml"
    laughs = "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    texts = {"a: &a [x,x,x,x,x,x,x,x]\n" + laughs: "more than 50000 values", "d: " + "[" * 5000: "nested more than", "d: 5\nd: 6": "stands twice"}
    for text, words in {**texts, "d: !!python/object/apply:os.system [x]": "is not used"}.items():
        path.write_text(text)
        began = time.monotonic()
        with pytest.raises(TeacherError, match=words):
            Compression.read(path)
        assert time.monotonic() - began < 20


OUT = ["../outside", "/etc", "a/../../b", "..", "a\\..\\b", "a\0b", ""]


@pytest.mark.parametrize("name", OUT)
def test_a_name_in_a_manifest_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("")
    home = tmp_path / "home"
    home.mkdir()
    assert "not in this folder" in str(damage(home, {name: (0, "")}, verify=False))
    (home / "pool.json").write_text(
        json.dumps({"format": 1, "mode": "lora", "base": {}, "entries": [{"name": "n", "condition": "c", "folder": name}]})
    )
    with pytest.raises(AdapterError, match="outside the pool"):
        read_pool(home)
    with pytest.raises(AdapterError, match="is no key"):
        DeltaCache(home).get(name)
    write_manifest(home, Manifest(Identity({}, 8, 2, (1.0,)), shards=(ShardInfo(name, 0, 0, 0, ""),)))
    with pytest.raises(TeacherError, match="no file of a store"):
        read_manifest(home)
    (home / "recipe.json").write_text(json.dumps({"stages": {name: {}}}))
    with pytest.raises(CheckpointError, match="leads out of the run"):
        read_run(home)


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".hidden", "/x", "a\\b"])
def test_names_of_stages_and_runs_are_names(name: str) -> None:
    stage = "{data: {source: {kind: text, path: p}, tokenizer: t, sequence: 64}, kind: prepare}"
    assert load_text(f"name: n\nstages: {{s: {stage}}}")
    for text in (f"name: '{name}'\nstages: {{s: {stage}}}", f"name: n\nstages: {{'{name}': {stage}}}"):
        with pytest.raises(RecipeError, match=r"cannot name a folder|a stage's name is"):
            load_text(text)


@pytest.mark.parametrize("name", [*OUT, "x" * 500, "ünïcode/…"])
def test_folders_of_adapters_are_named_by_what_is_safe(name: str, tmp_path: Path) -> None:
    folder = tmp_path / safe(name, 7)
    assert folder.resolve().parent == tmp_path.resolve()
    folder.mkdir()


def test_a_link_out_of_a_folder_is_not_copied(tmp_path: Path) -> None:
    private, model, out = tmp_path / "private", tmp_path / "model", tmp_path / "out"
    private.write_text("a key")
    for folder in (model, model / "additional_chat_templates", out):
        folder.mkdir()
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for link in (model / "chat_template.jinja", model / "additional_chat_templates" / "tool.jinja"):
        link.symlink_to(private)
        with pytest.raises(DataError, match="is a link to something outside"):
            copy_tokenizer(str(model), out)
        link.unlink()
    assert not any(path.read_text() == "a key" for path in out.rglob("*") if path.is_file())
    # The hub's cache is made of links.
    (tmp_path / "cache" / "blobs").mkdir(parents=True)
    snapshot = tmp_path / "cache" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "cache" / "blobs" / "b").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (snapshot / "tokenizer_config.json").symlink_to("../../blobs/b")
    copy_tokenizer(str(snapshot), out)
    assert "tokenizer_class" in (out / "tokenizer_config.json").read_text()


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    precious, place, new = tmp_path / "precious", tmp_path / "place", tmp_path / "new"
    for folder in (precious, new):
        folder.mkdir()
    (precious / "data").write_text("kept")
    place.symlink_to(precious)
    put_in_place(new, place)
    assert (precious / "data").read_text() == "kept" and place.is_dir() and not place.is_symlink()


RECIPE = """
name: taught
stages:
  distil:
    data: {source: {kind: text, path: corpus}, tokenizer: {vocabulary: 400}, sequence: 64, held_out: 0.2}
    student:
      config: {model_type: qwen3, vocab_size: 400, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 1,
               num_key_value_heads: 1, head_dim: 16, tie_word_embeddings: true}
    teacher: {kind: http, url: "URL", canary_every: 0}
    objectives: [{kind: topk_kl, k: 4}]
    optim: {groups: [{lr: 1e-3}]}
    loop: {steps: 1, batch_tokens: 128}
"""


class Overheard(StubTeacher):
    """Keeps what it was sent besides the body, and knows no tokenizer."""

    def __init__(self) -> None:
        super().__init__()
        # Answers are kept by model, and this one's have another vocabulary.
        self.model = 9
        self.sent: set[str] = set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.sent |= {scope["query_string"].decode(), dict(scope["headers"]).get(b"authorization", b"").decode()}
        await super().__call__(scope, receive, send)

    def health(self) -> dict[str, Any]:
        return {**super().health(), "tokenizer": None}


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_run_leaves_no_secret_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"A_TOKEN": "canary-of-the-token", "A_KEY": "canary-of-the-query", "A_PASSWORD": "canary-of-the-password"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(stub_teachers, "VOCABULARY", 400)
    (tmp_path / "corpus").mkdir()
    for source in sorted(Path(textwrap.__file__).parent.glob("[a-b]*.py"))[:25]:
        (tmp_path / "corpus" / source.name).write_bytes(source.read_bytes())
    said = ""

    def limbeck(*words: str, code: int = 0) -> None:
        nonlocal said
        result = CliRunner().invoke(app, list(words))
        said += result.output + repr(result.exception)
        assert result.exit_code == code, result.output

    stub = Overheard()
    with served(stub) as url:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(RECIPE.replace("URL", url + "/?key=${env:A_KEY}"))
        run = ["run", str(recipe), "--run-dir", str(tmp_path / "run")]
        limbeck("check", str(recipe))
        limbeck(*run, "distil.teacher.token_env=A_TOKEN")
        # The second start says what has changed.
        named = "distil.teacher.url=" + url.replace("//", "//me:${env:A_PASSWORD}@")
        limbeck(*run, named)
        limbeck("doctor", "--teacher", url + "/?key=${env:A_KEY}", "--token-env", "A_TOKEN")
        stub.before = lambda body: (400, f"you are {secrets['A_PASSWORD']}", {})
        limbeck(*run, named, "distil.loop.steps=2", code=2)
        limbeck("report", str(tmp_path / "run"))
    assert "Bearer canary-of-the-token" in stub.sent and "key=canary-of-the-query" in stub.sent and any(word.startswith("Basic ") for word in stub.sent)
    assert "teacher.url" in said and "***" in said and url in said
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"recipe.json", "stage.json", "metrics.jsonl", "environment.json", "MANIFEST.json", "report.html"} <= {path.name for path in files}
    for value in secrets.values():
        assert value not in said
        assert not [path for path in files if value.encode() in path.read_bytes()]


@pytest.mark.parametrize("url", ["http://me:hunter2x@host", "https://hunter2x@host/v1", "http://host/?api_key=hunter2x", "me:hunter2x@host"])
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(RecipeError, match=r"\$\{env:NAME\}|=\$\{env:NAME\}") as refused:
        load_text(RECIPE.replace("URL", url))
    assert "hunter2x" not in str(refused.value)
    doctor = CliRunner().invoke(app, ["doctor", "--teacher", url])
    assert doctor.exit_code and "hunter2x" not in doctor.output + repr(doctor.exception)


def test_a_url_keeps_its_variables_wherever_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_URL", "http://me:hunter2x@host")
    recipe = load_text(RECIPE.replace("URL", "${env:A_URL}") + '    grid: {"teacher.timeout": [1, 2]}\n')
    options = recipe.stages["distil"].teacher
    assert options.url == "http://me:hunter2x@host" and "hunter2x" not in repr(options) + json.dumps(resolved(recipe))
    assert resolved(recipe)["stages"]["distil"]["teacher"]["url"] == "${env:A_URL}"
    # A cell of a grid, and a run that is opened again, read it back.
    assert [cell.teacher.url for _, _, cell in grid_cells(recipe.stages["distil"])] == ["http://me:hunter2x@host"] * 2
    assert HttpTeacherOptions.model_validate(options.model_dump(mode="json")).url == options.url
    monkeypatch.delenv("A_URL")
    again = HttpTeacherOptions.model_validate(options.model_dump(mode="json"))
    from limbeck.teachers.http.teacher import HttpTeacher

    with pytest.raises(TeacherError, match="variable A_URL is not set"):
        HttpTeacher(again).load()
    with pytest.raises(RecipeError, match="variable A_URL is not set"):
        load_text(RECIPE.replace("URL", "${env:A_URL}"))
