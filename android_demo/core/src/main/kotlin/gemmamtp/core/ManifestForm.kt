package gemmamtp.core

import com.google.gson.JsonElement
import com.google.gson.JsonObject

private const val MAX_SIZE = 1L shl 62 // of a file, in bytes: more cannot be true
private const val MAX_COUNT = 1L shl 31
private const val MAX_NUMBER = 1e300

/** Checks a value at a path of keys, joined by dots; throws IllegalArgumentException where it has another form. */
internal fun interface Form {
    fun check(value: JsonElement, path: String)
}

private fun shown(value: JsonElement) = value.toString().take(60)

private fun form(expected: String, accepts: (JsonElement) -> Boolean) =
    Form { value, path -> require(accepts(value)) { "$path is ${shown(value)}, expected $expected" } }

private val VERSION = Regex("""[0-9]{1,9}(\.[0-9]{1,9}){0,5}([^0-9.].*)?""")

private val text = form("text", ::isText)
private val bool = form("true or false") { it.isJsonPrimitive && it.asJsonPrimitive.isBoolean }

/** A whole number that is not negative. */
private val size = form("a whole number that is not negative") { (whole(it) ?: -1) in 0 until MAX_SIZE }

/** The same, of something that lies in memory. */
private val count = form("a whole number from 0 to ${MAX_COUNT - 1}") { (whole(it) ?: -1) in 0 until MAX_COUNT }
private val number = form("a number") { value ->
    numeral(value)?.toDoubleOrNull()?.let { it > -MAX_NUMBER && it < MAX_NUMBER } ?: false
}
private val penalty = form("a number from $MIN_REPETITION to $MAX_REPETITION") { value ->
    numeral(value)?.toDoubleOrNull()?.let { it >= MIN_REPETITION && it <= MAX_REPETITION } ?: false
}

private fun numeral(value: JsonElement) = value.takeIf { it.isJsonPrimitive && it.asJsonPrimitive.isNumber }?.asString
private fun whole(value: JsonElement) = numeral(value)?.toLongOrNull()

private val version = form("a version such as 1.32.0") { isText(it) && VERSION.matches(it.asString) }
private val twoIds = form("two token ids") { isPair(it) { id -> (whole(id) ?: -1) in 0 until MAX_COUNT } }
private val twoTexts = form("two texts") { isPair(it, ::isText) }

private val beside = form("before, after or an empty text") { isText(it) && it.asString in listOf("before", "after", "") }

private fun isText(value: JsonElement) = value.isJsonPrimitive && value.asJsonPrimitive.isString
private fun isPair(value: JsonElement, accepts: (JsonElement) -> Boolean) =
    value.isJsonArray && value.asJsonArray.size() == 2 && value.asJsonArray.all(accepts)

/** An object; keys that end in `?` may be missing, and others than these may be there. */
private fun obj(vararg keys: Pair<String, Form>) = Form { value, path ->
    require(value.isJsonObject) { "${path.ifEmpty { "the document" }} is ${shown(value)}, expected an object" }
    for ((key, form) in keys) {
        val name = key.removeSuffix("?")
        val inner = "$path.$name".trimStart('.')
        val found = value.asJsonObject.get(name)
        require(found != null || key.endsWith("?")) { "$inner is missing" }
        if (found != null) form.check(found, inner)
    }
}

/** An object with any keys, whose values have one form. */
private fun map(form: Form) = Form { value, path ->
    require(value.isJsonObject) { "$path is ${shown(value)}, expected an object" }
    for ((key, inner) in value.asJsonObject.entrySet()) form.check(inner, "$path.$key")
}

private fun list(form: Form) = Form { value, path ->
    require(value.isJsonArray) { "$path is ${shown(value)}, expected a list" }
    value.asJsonArray.forEachIndexed { i, inner -> form.check(inner, "$path[$i]") }
}

private fun nullable(form: Form) = Form { value, path -> if (!value.isJsonNull) form.check(value, path) }

private fun both(one: Form, other: Form) = Form { value, path ->
    one.check(value, path)
    other.check(value, path)
}

private val graph = obj("file" to text, "inputs" to list(obj("name" to text)), "outputs" to list(obj("name" to text)))
private val rows =
    obj("rows" to count, "columns" to count, "encoding" to text, "row_bytes" to count, "group_size" to count)
private val parts = list(obj("file" to text, "offset" to size, "rows" to count))
private val table = both(
    rows,
    obj("data" to obj("parts" to parts), "scales?" to obj("dtype" to text, "parts" to parts)),
)
private val textConfig = obj(
    "vocab_size" to count, "hidden_size" to count, "sliding_window" to count, "num_hidden_layers" to count,
    "layer_types" to list(text), "final_logit_softcapping?" to nullable(number),
)
private val tokens = obj(
    "bos" to count, "eos" to list(count), "pad?" to count, "suppressed?" to list(count), "names?" to map(text),
)
private val buffer = obj(
    "name" to text, "layer" to count, "layer_type" to text, "num_key_value_heads" to count, "head_dim" to count,
)
private val origin = obj("files" to map(text), "id?" to text, "revision?" to text, "license?" to text)
private val exported = obj(
    "files" to map(text), "id?" to text, "revision?" to text, "license?" to text, "adapters?" to list(origin),
)

/** What both formats have in common. */
private val common = obj(
    "format_version" to size,
    "tool_version?" to text,
    "backend" to obj("name" to text),
    "recipe" to text,
    "max_seq_len" to count,
    "num_draft_tokens" to obj("default" to count, "max" to count),
    "limits" to obj("num_tokens" to count, "num_outputs" to count, "cache_rows" to count, "window_rows" to count),
    "row_multiple" to count,
    "row_multiple_arm64?" to count,
    "tokens" to tokens,
    "sampling?" to nullable(
        obj("temperature" to number, "top_k" to size, "top_p" to number, "repetition_penalty?" to penalty),
    ),
    "target" to textConfig,
    "drafter" to obj("text" to textConfig),
    "two_stage" to nullable(
        obj("origin" to text, "num_clusters" to size, "cluster_size" to size, "top_k_clusters" to size),
    ),
    "kv" to obj("buffers" to list(buffer)),
    "graphs" to obj("target" to graph, "drafter" to graph),
    "files" to map(obj("size" to size, "sha256" to text)),
    "chat?" to obj(
        "begin" to text, "turns" to both(obj("user" to twoTexts, "assistant" to twoTexts), map(twoTexts)),
        "answer" to text, "trim" to bool, "alternate" to bool, "hidden" to nullable(twoTexts),
    ),
)

/** The form of a manifest's keys that programs read, as `runtime_ref/manifest_form.py` has it. */
internal val FORM_3 = both(
    common,
    obj(
        "requires" to list(obj("name" to text, "since" to text)),
        "backend" to obj("min_runtime?" to version),
        "tokens" to obj(
            "channels?" to map(twoIds),
            "parts?" to map(obj("before" to text, "after" to text, "syntax?" to text, "quote?" to text)),
        ),
        "kv" to obj("buffers" to list(obj("dtype" to text, "layout" to list(text)))),
        "tables" to obj("embed_tokens" to table, "embed_tokens_per_layer?" to table, "head?" to table),
        "widths?" to list(obj("bits" to size, "group_size" to nullable(size), "matrices" to list(text))),
        "activations?" to text,
        "calibration?" to obj(
            "texts" to text, "sha256" to text, "tokens" to size, "threads" to size, "matrices" to list(text),
        ),
        "source" to obj("target" to exported, "drafter" to origin),
        "conversations?" to list(
            obj(
                "tools" to bool, "thinking" to list(nullable(bool)), "between" to map(map(text)), "trim" to list(text),
                "hidden" to nullable(twoTexts), "thoughts" to list(text), "names" to bool, "beside" to beside, "blanks" to bool,
            ),
        ),
        "tools?" to list { _, _ -> },
    ),
)

private val place = obj("file" to text, "offset" to size)
private val table2 = both(rows, obj("data" to place, "scales?" to both(place, obj("dtype" to text))))

internal val FORM_2 = both(
    common,
    obj(
        "backend" to obj("executorch?" to version),
        "tokens" to obj("thoughts?" to nullable(twoIds)),
        "tables" to obj("embed_tokens" to table2, "embed_tokens_per_layer" to table2),
        "source" to obj("target" to map(text), "drafter" to map(text)),
    ),
)

/** Checks a manifest as a whole; throws IllegalArgumentException. */
internal fun checkForm(raw: JsonObject, form: Form) = form.check(raw, "")
