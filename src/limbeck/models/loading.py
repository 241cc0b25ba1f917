"""Models in and out: strict loading, building from a config, and saving a folder that leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from limbeck.errors import DataError, ModelError, did_you_mean
from limbeck.files import inside, put_in_place, sha256
from limbeck.models.experts import pin_experts
from limbeck.models.limbeck_model import HybridMixin, pin_attention
from limbeck.models.strict import check_loading

BUILTIN = Path(__file__).parents[1] / "builtin"
MOST_LAYERS = 10_000
"""More than any model has: a damaged number, which would keep a process busy for hours."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)
ROPE_FIELDS = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq")
"""Older names that transformers' configs still take and fold into ``rope_parameters``."""


def resolve_source(source: str, base_dir: Path | None = None) -> str:
    """``builtin:NAME`` as the folder in the package, an existing folder as an absolute path, else a hub name.

    Folders are looked for beside the recipe (``base_dir``) and then in the working directory.
    """
    if source.startswith("builtin:"):
        name = source.removeprefix("builtin:")
        known = sorted(path.name for path in BUILTIN.iterdir() if path.is_dir()) if BUILTIN.is_dir() else []
        if name not in known:
            raise ModelError(f"no built-in {name!r}{did_you_mean(name, known) or ';'} built in: {', '.join(known) or 'none'}")
        return str(BUILTIN / name)
    path = Path(source).expanduser()
    for root in (base_dir, Path.cwd()):
        if root is not None and (root / path).is_dir():
            return str((root / path).resolve())
    if source.startswith((".", "/", "~")) or not HUB_NAME.fullmatch(source):
        looked = " and ".join(dict.fromkeys(str(root) for root in (base_dir, Path.cwd()) if root is not None))
        raise ModelError(f"{source}: no such folder (looked from {looked}), and it is not a hub name like 'organisation/model'")
    return source


def load_model(
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attention: str | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """A causal language model from a folder or the hub, in evaluation mode, every tensor accounted for.

    Only safetensors are read and no code from the folder is run.  ``dtype`` is the weights'; rotary frequencies stay fp32
    (which is why nothing is cast by ``.to(dtype)``).  ``attention`` is the attention implementation; by default the one saved
    with the model, else what transformers takes for the family.
    """
    check_folder(source)
    config = load_config(source, revision)
    if attention is not None:
        config._attn_implementation = attention
    pin_attention(config)
    pin_experts(config)
    try:
        with _quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                revision=revision or "main",
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except ModelError:
        raise
    except ImportError as error:
        raise ModelError(
            f"{source}: attention implementation {config._attn_implementation!r} is not available here "
            f"({_first_line(error)}): set `attention: sdpa`"
        ) from error
    except Exception as error:
        # transformers, huggingface_hub and safetensors raise some twenty unrelated types for a bad folder, a bad name and no
        # network.
        raise ModelError(
            f"{source}: cannot be loaded ({type(error).__name__}: {_first_line(error)}){_way_out(source)}"
        ) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(f"{source}: is an adapter of another model, which was loaded in its place: name the base, and merge the adapter first")
    check_loading(model, info, source)
    model.to(device)
    model.eval()
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no table of missing keys from transformers: what is wrong is said once, by us."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def load_config(source: str, revision: str | None = None) -> PreTrainedConfig:
    """The config of a folder or hub model; families that Limbeck cannot use are refused by name."""
    try:
        config = AutoConfig.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:
        # As above: many unrelated types, one meaning for the user.
        raise ModelError(
            f"{source}: its config.json cannot be read ({type(error).__name__}: {_first_line(error)}){_way_out(source)}"
        ) from error
    _check_family(config, source)
    return config


def _check_family(config: PreTrainedConfig, source: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{source}: '{config.model_type}' is an encoder-decoder; Limbeck uses decoder-only causal language models, name one of those"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{source}: transformers has no causal language model for model type '{config.model_type}'; name a model that writes text")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{source}: its weights are quantised; use the full-precision model it was made from")
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        # transformers would build them, one by one, before it looks into the files.
        raise ModelError(f"{source}: its config.json says {layers!r:.80} layers, and at most {MOST_LAYERS} are built: download or save the folder again")


def check_folder(source: str) -> None:
    """Say what a local folder lacks before transformers looks into it; hub names pass."""
    folder = Path(source)
    if not folder.exists():
        if source.startswith((".", "/", "~")) or not HUB_NAME.fullmatch(source):
            raise ModelError(f"{source}: no such folder, and it is not a hub name like 'organisation/model'")
        return
    if not folder.is_dir():
        kind = "a GGUF file" if folder.suffix == ".gguf" else "a file"
        raise ModelError(f"{source}: is {kind}; Limbeck loads folders with config.json and *.safetensors")
    if not (folder / "config.json").is_file():
        inside = sorted(path.name for path in folder.iterdir())[:6]
        raise ModelError(
            f"{source}: no config.json in this folder ({', '.join(inside) or 'it is empty'}); name the folder that "
            "save_pretrained wrote"
        )
    if not any(folder.glob("*.safetensors")):
        for pattern, what, way in (
            ("*.bin", "pickled weights", "load them once with transformers and save_pretrained, which writes safetensors"),
            ("*.pth", "pickled weights", "convert them to a Hugging Face folder with safetensors"),
            ("*.gguf", "GGUF weights", "use the Hugging Face folder they were made from"),
        ):
            if any(folder.glob(pattern)):
                raise ModelError(f"{source}: has {what} only, which Limbeck does not read; {way}")
        raise ModelError(f"{source}: has a config.json and no weights (*.safetensors); was the download or the save cut short?")
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{source}: has an adapter_config.json beside its weights, so that transformers would load another model, which that file names: "
            "remove it, or put the adapter into a folder of its own"
        )
    weight_files(folder)


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights of a local folder from; others beside them hold the same in another form.

    Raises:
        ModelError: an index that cannot be read, or names what is no safetensors file of this folder (transformers would go where it
            points, and unpickle what it finds there).
    """
    named = _json_object(folder / "config.json", f"{folder}: its config.json cannot be read").get("transformers_weights")
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if named is not None:
        _check_weight_file(folder, folder / "config.json", "transformers_weights", named)
        return [folder / named]
    if one.is_file():
        return [one]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    weights = _json_object(index, wrong := f"{index}: is no index of files").get("weight_map")
    if not isinstance(weights, dict):
        raise ModelError(f"{wrong} (it has no `weight_map`): download or save the folder again")
    for name in weights.values():
        _check_weight_file(folder, index, "weight_map", name)
    return [folder / name for name in sorted(set(weights.values()))]


def _check_weight_file(folder: Path, where: Path, field: str, name: Any) -> None:
    if inside(folder, name) is None or not name.endswith(".safetensors"):
        raise ModelError(f"{where}: {field} names {name!r:.80}: weights are *.safetensors files in the same folder; get the model from who made it")


def _json_object(path: Path, wrong: str) -> dict[str, Any]:
    """A file's JSON object, or an error that begins with ``wrong``."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{wrong} ({type(error).__name__}: {_first_line(error)}): download or save the folder again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{wrong} (a JSON {type(found).__name__}, not an object): download or save the folder again")
    return found


def _way_out(source: str) -> str:
    if Path(source).exists():
        return ": download or save the folder again"
    return (
        ". It is not a folder here, so it was looked for on the hub: check the name, or without a network "
        "download it first and name its folder"
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def build_model(
    config: dict[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float32, attention: str | None = "sdpa"
) -> PreTrainedModel:
    """A model from scratch, from the fields of a Hugging Face config with its ``model_type``.

    An unknown family or field is an error with the nearest names (transformers would keep the field and ignore it).  Random
    numbers come from ``seed`` alone and the global generator is left as it was.
    """
    rest = dict(config)
    model_type = rest.pop("model_type", None)
    if model_type is None or model_type not in CONFIG_MAPPING:
        hint = did_you_mean(str(model_type), CONFIG_MAPPING.keys()) or "; for example qwen3, llama, olmo2"
        raise ModelError(f"config.model_type: {'is missing' if model_type is None else f'unknown family {model_type!r}'}{hint}")
    config_class = CONFIG_MAPPING[model_type]
    known = {field.name for field in fields(config_class) if not field.name.startswith("_")} | set(config_class.attribute_map)
    if "rope_parameters" in known:
        known |= set(ROPE_FIELDS)
    unknown = [f"config.{name}: unknown field of '{model_type}'{did_you_mean(name, known)}" for name in rest if name not in known]
    if unknown:
        raise ModelError("\n".join(unknown))
    try:
        built = config_class(**rest)
    except Exception as error:
        # A config class checks its fields with its own validators, whose error types are not public.
        raise ModelError(f"config: transformers' '{model_type}' refuses it ({_first_line(error)})") from error
    _check_family(built, "config")
    pin_experts(built)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(built, dtype=dtype, attn_implementation=attention)
        except (ValueError, ImportError) as error:
            raise ModelError(f"config: {_first_line(error)}") from error
    model.eval()
    return model


def load_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub model, without running code from it.

    A folder without one is a :class:`DataError`: transformers would make an empty one for some families.
    """
    if Path(source).is_dir() and not any((Path(source) / name).exists() for name in TOKENIZER_FILES):
        raise _no_tokenizer(source)
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    except Exception as error:
        # As in load_model: many unrelated types.
        raise DataError(
            f"{source}: no tokenizer can be loaded ({type(error).__name__}: {_first_line(error)}){_way_out(source)}"
        ) from error


def fingerprint(source: str, revision: str | None = None) -> dict[str, str]:
    """What identifies a model's weights: SHA-256 of its config and weight files, or the hub commit."""
    folder = Path(source)
    if folder.is_dir():
        weights = hashlib.sha256()
        for path in sorted(folder.glob("*.safetensors")):
            weights.update(f"{path.name}:{_file_hash(path)}\n".encode())
        return {"config": _file_hash(folder / "config.json"), "weights": weights.hexdigest()}
    return {"hub": source, "commit": _hub_commit(source, revision)}


def _file_hash(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}): let yourself read it, or put an intact copy back") from error
    return _hash_once(str(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _hash_once(path: str, size: int, modified_ns: int) -> str:
    return sha256(Path(path))


def _hub_commit(source: str, revision: str | None) -> str:
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        commit = HfApi().model_info(source, revision=revision).sha
    except Exception:
        # Without a network the commit of the copy that will be loaded is the answer.
        cached = try_to_load_from_cache(source, "config.json", revision=revision)
        commit = Path(cached).parent.name if isinstance(cached, str) else None
    if commit is None:
        raise ModelError(f"{source}: its commit cannot be read, neither from the hub nor from the local cache{_way_out(source)}")
    return commit


def save_model(
    model: PreTrainedModel,
    folder: Path,
    *,
    tokenizer_source: str | None = None,
    dtype: torch.dtype | None = None,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write config, safetensors, generation config, tokenizer and chat template; complete or not at all.

    ``dtype`` is that of the saved parameters (a cast copy: the model is not touched; buffers keep theirs).  ``state_dict``
    (tensors of any shape) stands in for the model's own, for one that was gathered from shards.  The attention implementation is saved as
    ``limbeck_attention``.
    """
    folder = Path(folder)
    # One name, so that what a killed save left behind goes with the next.
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        state = _without_tied(model, dict(model.state_dict() if state_dict is None else state_dict))
        if dtype is not None:
            trained = {name for name, _ in model.named_parameters()}
            state = {name: t.to(dtype) if name in trained and t.is_floating_point() else t for name, t in state.items()}
        with _quiet():
            # transformers writes stacked experts as their family's files have them, one by one, and stacks them again for that family alone.
            model.save_pretrained(beside, state_dict=state, save_original_format=not isinstance(model, HybridMixin))
        _finish_config(model, beside / "config.json", dtype)
        if tokenizer_source is not None:
            copy_tokenizer(tokenizer_source, beside)
        put_in_place(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _without_tied(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out what is tied to something that is there: gathered copies no longer share memory, and would be written twice."""
    return {name: tensor for name, tensor in state.items() if model.all_tied_weights_keys.get(name) not in state}


def _finish_config(model: PreTrainedModel, path: Path, dtype: torch.dtype | None) -> None:
    config = json.loads(path.read_text())
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    config["limbeck_attention"] = model.config._attn_implementation
    if model._can_set_experts_implementation():
        config["limbeck_experts"] = model.config._experts_implementation
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def copy_tokenizer(source: str, folder: Path) -> None:
    """The tokenizer's files and chat templates of a folder as they are, or of a hub model as transformers saves them.

    A folder that does not name its tokenizer's class is saved by transformers too: the class would be guessed from the model
    type, and a student's is ``limbeck``.
    """
    origin = Path(source)
    found = [origin / name for name in TOKENIZER_FILES if (origin / name).exists()]
    if origin.is_dir() and not found:
        raise _no_tokenizer(source)
    if not _names_tokenizer_class(origin / "tokenizer_config.json"):
        load_tokenizer(source).save_pretrained(folder)
        return
    for path in found:
        for file in (path, *(path.rglob("*") if path.is_dir() else ())):
            _check_own(origin, file)
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)


def _check_own(folder: Path, file: Path) -> None:
    """Refuse to copy what only a link brings into a folder: a stranger's model would take a private file along into what is published."""
    home, target = folder.resolve(), file.resolve()
    # The hub's cache: snapshots/COMMIT/NAME -> blobs/HASH.
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise DataError(f"{file}: is a link to something outside this folder ({target}): put the file itself here")


def _no_tokenizer(source: str) -> DataError:
    return DataError(f"{source}: no tokenizer files in this folder (looked for {', '.join(TOKENIZER_FILES[:4])} ...): save the tokenizer there too")


def _names_tokenizer_class(path: Path) -> bool:
    try:
        return "tokenizer_class" in json.loads(path.read_text())
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error}): download or save the folder again") from error
