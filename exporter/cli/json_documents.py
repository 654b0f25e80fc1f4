"""The forms of the documents that `--json` prints, from which docs/schemas/ is written."""

from exporter.terminal import SCHEMA_VERSIONS
from runtime_ref.manifest_form import TABLE, Form, number, size

NULLABLE = (None, number)


def keys(form: Form, names: str) -> dict[str, Form]:
    """Return the keys of an object whose values have one form; names are separated by spaces."""
    return dict.fromkeys(names.split(), form)


_ATTENTION = {"rope_type": str, **keys(size, "head_dim num_key_value_heads")}
_ATTENTION |= keys(number, "rope_theta partial_rotary_factor rope_factor")
_SIZES = {
    **keys(size, "vocab_size hidden_size num_hidden_layers sliding_window"),
    "layer_types": {"*": size},
    # A manifest may lack these.
    **keys(size, "intermediate_size? num_attention_heads? num_kv_shared_layers? max_position_embeddings?"),
    **keys(size, "hidden_size_per_layer_input? vocab_size_per_layer_input?"),
    **keys(_ATTENTION, "sliding_attention? full_attention?"),
    "rms_norm_eps?": number,
    "use_double_wide_mlp?": bool,
    "final_logit_softcapping?": NULLABLE,
}
_TWO_STAGE = keys(size, "num_clusters cluster_size top_k_clusters")
_WIDTHS = [{"bits": size, "group_size": (None, size), "matrices": {"*": size}}]
_HEAD = (None, {"origin": str, **_TWO_STAGE})
_FILES = {"files": {"*": size}, "total_bytes": size}
_ORIGIN = {"files": {"*": str}, **keys(str, "id? revision? license?")}
_CHECKPOINT = {**keys(size, "tensors tensors_used parameters"), "dtypes": {"*": size}, **_FILES}
_CHECK = {**keys(str, "rung output detail"), "passed": bool, **keys(NULLABLE, "error tolerance")}
_DRAFT_TOKENS = keys(size, "default max")
_TIME = {**keys(number, "median quartile min"), "count": size}
_RATE = {**keys(number, "median max min?"), "count": size}
_COST = {"ms": _TIME, "cost": number}
_COSTS = {
    "context": size,
    "prefill": {"ms": _TIME, "tokens_per_second": number},
    "decode": {"ms": _TIME, "tokens_per_second": number, "share_of_bandwidth?": NULLABLE},
    "passes": [{"tokens": size, **_COST}],
    "draft_step": {"steps_in_a_row": size, "two_stage_share_of_dense_head": NULLABLE, **_COST},
}
_RESIDENT = keys({"total_bytes": size, "added_bytes": number}, "anonymous files")
_LOAD = {
    "seconds": _TIME,
    "resident": (
        None,
        {
            "before": (None, keys(size, "anonymous files")),
            "loaded": (None, _RESIDENT),
            "generated": (None, _RESIDENT),
            "generated_tokens": size,
        },
    ),
    "torch_imported": bool,
}
_MACHINE = {**keys(str, "machine backend recipe"), "threads": size, "versions": {"*": (None, str)}}
_RECALL_ROW = {**keys(size, "top_k_clusters tokens_scored"), **keys(number, "recall share_of_dense_head")}
_RECALL = {
    **_TWO_STAGE,
    "recall": number,
    "checkpoint_clusters": (None, size),
    "num_states": size,
    "states": str,
    "curve": [{**_RECALL_ROW, "checkpoint_recall?": NULLABLE}],
}
_BY_POSITION = {**keys(size, "position drafted reached accepted"), **keys(NULLABLE, "accepted_share conditional")}
_ACCEPTANCE = {**keys(size, "drafted accepted"), "rate": NULLABLE, "by_position": [_BY_POSITION]}
_PIECE = {"text": str, "drafted": bool}
_DRAFTING = {
    "num_draft_tokens": size,
    **keys(_ACCEPTANCE, "acceptance longest"),
    "rounds": {"rounds": size, "mean": NULLABLE, "distribution": [keys(size, "tokens rounds")]},
    "sample": {"prompt": str, "pieces": [_PIECE], **keys(size, "tokens drafted passes")},
}
_SPEED = {"tokens_per_second": _RATE, "times_faster": number, "tokens_per_round": NULLABLE}
_MEASURED = {
    "texts": {"prompts": str, **keys(size, "count prompt_tokens new_tokens")},
    "speed": {
        "measured": [{"num_draft_tokens": size, **_SPEED}],
        "auto": (None, {**_SPEED, "rounds": size, "chosen": [keys(size, "num_draft_tokens rounds")]}),
        "same_tokens": bool,
        "turns": size,
        "computed?": [{"num_draft_tokens": size, **keys(number, "times_faster tokens_per_second")}],
    },
    "costs": _COSTS,
    "load": _LOAD,
    "drafting": (None, _DRAFTING),
}
_FORCED = {
    **keys(number, "tokens_per_round expected_tokens_per_round times_faster expected_times_faster"),
    "num_draft_tokens": size,
    "tokens_per_second": _RATE,
}
_SPEEDUP = {**keys(size, "context best_num_draft_tokens?"), **keys(number, "acceptance best?")}

# The alternatives of each command's document.
DOCUMENTS: dict[str, tuple[Form, ...]] = {
    "export": (
        {
            **keys(str, "bundle digest recipe"),
            **keys(size, "bytes peak_bytes"),
            "seconds": number,
            "calibrated": [str],
            "folded": [str],
            "warnings": [str],
            "rules": str,
        },
    ),
    "generate": (
        {
            "tokens": [size],
            **keys(str, "thought? finish_reason session?"),
            "text": (None, str),
            "tool_calls?": [{**keys(str, "id name text problem"), "arguments": {"*": object}}],
            **keys(size, "rounds drafted accepted reused_prompt_tokens"),
            **keys(size, "dropped_tokens tokens_left dropped_messages"),
            **keys(NULLABLE, "acceptance_rate mean_tokens_per_round"),
            "acceptance_by_position": [number],
            "rounds_by_num_draft_tokens": {"*": size},
            "drafts_by_source": {"*": keys(size, "rounds drafted accepted")},
            **keys(number, "prefill_seconds decode_seconds"),
        },
    ),
    "prefill": ({"session": str, **keys(size, "tokens bytes"), "seconds": number},),
    "parity": (
        {
            "passed": bool,
            "figures": {
                **keys(size, "bundle_bytes positions?"),
                **keys(NULLABLE, "acceptance_rate? acceptance_rate_fp32? choices_kept? kl? sqnr_db?"),
                **keys(NULLABLE, "perplexity? perplexity_fp32?"),
            },
            "checks": [_CHECK],
        },
    ),
    "inspect": (
        {
            **keys(str, "kind digest recipe"),
            **keys(size, "format_version max_seq_len kv_bytes_per_token kv_sliding_bytes"),
            **keys([str], "requires changed_files"),
            "backend": {"name": str},
            "num_draft_tokens": _DRAFT_TOKENS,
            "tokens": {"eos": [size], **keys(size, "bos pad?")},
            **keys(_SIZES, "target drafter"),
            "two_stage": _HEAD,
            "widths?": _WIDTHS,
            "calibration?": {**keys(str, "texts sha256"), **keys(size, "tokens threads matrices")},
            "tables": {"*": TABLE},
            "source": {"target": {**_ORIGIN, "adapters?": [_ORIGIN]}, "drafter": _ORIGIN},
            **_FILES,
        },
        {**keys(str, "kind digest"), **keys(size, "tokens total_bytes max_seq_len? tokens_left? messages?")},
        {"kind": str, "target": _SIZES, "widths?": _WIDTHS, **_CHECKPOINT},
        {
            "kind": str,
            "drafter": _SIZES,
            "backbone_hidden_size": size,
            "two_stage": (None, _TWO_STAGE),
            **_CHECKPOINT,
        },
    ),
    "bench": (
        {
            "bundle": str,
            **_MACHINE,
            "load_average": NULLABLE,
            "read_bandwidth_gb_s": {**keys(number, "median max"), **keys(size, "count buffer_bytes")},
            "decode_weights": {"bytes": (None, size), "derived_from": str},
            "load": _LOAD,
            "contexts": [_COSTS],
            "speedup": [{**_SPEEDUP, "by_num_draft_tokens": [number]}],
            "generation": {
                **keys(size, "context new_tokens turns"),
                "acceptance": number,
                "same_tokens": bool,
                "plain": {"tokens_per_second": _RATE},
                "speculative": [_FORCED],
            },
        },
    ),
    "cluster": ({**_RECALL, "seconds": number, "peak_bytes": size},),
    "doctor": (
        {
            "findings": size,
            "acceptance_rate": NULLABLE,
            "gain": (None, {"num_draft_tokens": size, "times_faster": number}),
            "experiments": [keys(str, "experiment verdict detail")],  # and the figures of each, by name
        },
    ),
    "recipe": (
        {
            "costs": [
                {
                    "matrices": str,
                    "width": {"bits": size, "group_size": (None, size)},
                    "bytes": size,
                    **keys(number, "kl choices_kept"),
                }
            ],
            **keys(size, "other_bytes positions"),
            "held_out": str,
            "calibrated_on": (None, str),
            "choices": [{"bytes": size, "kl": number}],
            "chosen": (None, {"bytes": size, "kl": number, "rules": str}),
        },
    ),
    # Of `python -m exporter.demo.synthetic`.
    "synthetic": ({"pair": str, **keys(size, "bytes peak_bytes"), "seconds": number},),
    "report": (
        {
            **keys(str, "name bundle date not_measured"),
            **_MACHINE,
            "max_seq_len": size,
            "num_draft_tokens": _DRAFT_TOKENS,
            "measured": (None, _MEASURED),
            "two_stage": _HEAD,
            "recall": (None, _RECALL),
            **_FILES,
            "parity": {**keys(bool, "passed with_checkpoints"), "checks": [_CHECK]},
        },
    ),
}

# Documents of several prompts are a list of such objects.
LISTS = ("generate",)


def document_forms(command: str) -> tuple[Form, ...]:
    """Return the alternatives of a command's document, with the version that each document has."""
    assert command in SCHEMA_VERSIONS
    return tuple({"schema_version": size, **form} for form in DOCUMENTS[command])
