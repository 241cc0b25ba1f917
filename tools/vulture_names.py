"""Names that look unused to vulture, by what uses them: code that is not ours, or a way that no file of ours spells out.

``tools/check_code.py`` reads the list, and complains about a name that need not be here.
"""

NAMES: dict[str, str] = {
    "transformers asks a cache's layers and a student for these": """
        is_compileable is_croppable is_sliding supports_early_init key_states value_states tokens_to_remove
        get_seq_length get_mask_sizes get_max_length lazy_initialization crop reorder_cache
        batch_repeat_interleave batch_select_indices offload prefetch""",
    "Hugging Face layers call their attention with it; mixers know padding and documents by other arguments": "attention_mask",
    "torch's optimisers have it in the signature of `step`": "closure",
    "lm-evaluation-harness calls or reads these of an LM": "eot_token_id _model_call attn_mask logits_cache loglikelihood_rolling",
    "logging calls it of a handler": "emit",
    "click, typer and rich call or read these": """
        format_options format_commands process_renderables no_wrap overflow _repr_mimebundle_""",
    "PyYAML reads these of a loader and a dumper": "yaml_implicit_resolvers ignore_aliases",
    "xllamacpp reads these of its parameters": """
        n_batch n_ubatch n_ctx n_parallel n_gpu_layers n_threads n_threads_http cache_type_k cache_type_v cache_ram_mib
        flash_attn_type fit_params verbosity ctx_shift endpoint_slots ui api_keys hostnames""",
    "the gguf package's writer reads it": "fout",
    "uvicorn reads these of a server": "should_exit force_exit",
    "tokenizers and transformers read these of a tokenizer": "pre_tokenizer bos_token",
    "ctypes reads it of a function": "restype",
    "HTMLParser calls these": "handle_starttag handle_endtag",
    "pytest reads it of a module": "pytestmark",
    "MkDocs and Python-Markdown call or read these": """
        is_documentation_page content_string extendMarkdown on_config on_files on_page_markdown""",
    "a validator reads the option before the class has it": "preset",
    "`rank_layers` finds its methods by the name in the recipe": "_greedy _replace_one _halo _residual _ga_s2",
    "a loop over the names of fields reads it": "all_values",
    "columns of a file, numbered together with those that are read": "CONDITION PROMPT_END SIDE",
    "fields of records that are written to JSON for people": "dropped_names llama_cpp",
    "a field of DistillKit's compression_config.yaml, which its decoder does not need": "error_diffusion",
    "a part of a cache's key": "inode",
    "told to who makes a student in Python, by `wrap_student`": "surgery_reports",
    "a test runs it in a process of its own": "nursery",
    "tests/stub_fla.py has the signatures of flash-linear-attention, and flash-linear-attention is the one to read them": """
        use_qk_l2norm_in_kernel allow_neg_eigval cu_seqlens_cpu use_beta_sigmoid_in_kernel state_v_first cp_context chunk_indices
        safe_gate use_gate_in_kernel lower_bound return_intermediate_states disable_recompute use_graph max_num_seqs g_gamma
        checkpoint_level""",
}
