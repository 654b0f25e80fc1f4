package gemmamtp.core

import com.google.gson.JsonElement
import com.google.gson.JsonObject
import com.google.gson.JsonParser
import com.google.gson.stream.JsonReader
import com.google.gson.stream.JsonToken
import java.io.File

/** A token that is searched in the text before encoding; [normalized] ones are searched after normalizing. */
internal class AddedToken(val id: Int, val content: String, val special: Boolean, val normalized: Boolean)

/** The parts of a tokenizer.json, as far as Gemma's files use them. */
internal class TokenizerParts(
    val vocabulary: Vocabulary,
    val bpe: Bpe,
    val added: List<AddedToken>,
    val normalize: (String) -> String,
    val split: (String) -> List<String>,
    val decode: (List<String>) -> List<String>,
)

/**
 * Read a tokenizer.json as a stream: Gemma's has 32 MB, and a phone's heap is not much larger.
 *
 * @throws InputError it cannot be read, or uses something that Gemma's files do not.
 */
internal fun readTokenizer(file: File): TokenizerParts =
    try {
        TokenizerJson(file).parts()
    } catch (error: OutOfMemoryError) {
        throw InputError("$file: does not fit in memory; close other apps and try again", error)
    } catch (error: Exception) { // Gson's reader throws several, which share no other type
        if (error is InputError) throw error
        val reason = (error.message ?: error.toString()).lineSequence().first()
        throw InputError("$file: cannot be read as a tokenizer ($reason); export the bundle again", error)
    }

/** Reads one file. */
private class TokenizerJson(private val file: File) {
    private val small = HashMap<String, JsonElement>() // all but vocabulary and merges, by path
    private val vocabulary = Vocabulary()
    private val merges = Merges(vocabulary)
    private var mergesRead = false

    fun parts(): TokenizerParts {
        open(::readWhole)
        if (!mergesRead) open(::readWhole) // merges may come before the vocabulary, which they need
        require(mergesRead) { "model.vocab or model.merges is missing or empty" }
        merges.sort()
        // `truncation` and `padding` are what a training left there: prompts are neither cut nor padded.
        val bpe = bpe()
        val normalizer = small["normalizer"]
        val decoder = small["decoder"] ?: refuse("decoder", "none", "Replace, ByteFallback and Fuse")
        return TokenizerParts(
            vocabulary, bpe, added(), normalizer(normalizer), split(small["pre_tokenizer"]), decoder(decoder),
        )
    }

    private fun open(read: (JsonReader) -> Unit) = JsonReader(file.bufferedReader()).use(read)

    private fun readWhole(reader: JsonReader) {
        reader.forEachName { name ->
            if (name != "model") keep(name, reader) else reader.forEachName { readModel(it, reader) }
        }
    }

    private fun readModel(name: String, reader: JsonReader) {
        if (name == "vocab" && vocabulary.size == 0) {
            if (reader.peek() != JsonToken.BEGIN_OBJECT) refuse("model.vocab", reader.peek(), "an object")
            reader.forEachName { vocabulary.add(it, reader.nextInt()) }
        } else if (name == "merges" && vocabulary.size > 0 && !mergesRead) {
            readMerges(reader)
            mergesRead = true
        } else if (name == "vocab" || name == "merges") {
            reader.skipValue()
        } else {
            keep("model.$name", reader)
        }
    }

    private fun readMerges(reader: JsonReader) {
        reader.beginArray()
        while (reader.hasNext()) {
            if (reader.peek() == JsonToken.STRING) { // the form of older files
                val merge = reader.nextString()
                val pair = merge.split(' ')
                require(pair.size == 2) { "merge \"$merge\" is not two tokens" }
                merges.add(pair[0], pair[1])
            } else {
                reader.beginArray()
                merges.add(reader.nextString(), reader.nextString())
                reader.endArray()
            }
        }
        reader.endArray()
    }

    private fun keep(name: String, reader: JsonReader) {
        val value = if (name == "post_processor") return reader.skipValue() else JsonParser.parseReader(reader)
        if (!value.isJsonNull) small[name] = value
    }

    private fun bpe(): Bpe {
        val type = small["model.type"]
        if (type != null && type.asString != "BPE") refuse("model.type", type, "BPE")
        if (small["model.dropout"]?.asDouble ?: 0.0 != 0.0) requireNull("model.dropout")
        for (name in listOf("continuing_subword_prefix", "end_of_word_suffix")) {
            if (small["model.$name"]?.asString?.isEmpty() == false) requireNull("model.$name")
        }
        val unk = small["model.unk_token"]?.asString?.let {
            vocabulary.id(it).also { id -> require(id >= 0) { "model.unk_token $it is not in model.vocab" } }
        }
        fun flag(name: String): Boolean = small["model.$name"]?.asBoolean ?: false
        return Bpe(vocabulary, merges, unk, flag("fuse_unk"), flag("byte_fallback"), flag("ignore_merges"))
    }

    private fun added(): List<AddedToken> {
        var next = vocabulary.size
        val ids = HashMap<String, Int>()
        for (token in small["added_tokens"]?.asJsonArray ?: return emptyList()) {
            val entry = token.asJsonObject
            val content = entry["content"].asString
            for (name in listOf("single_word", "lstrip", "rstrip")) {
                if (entry.flag(name)) refuse("added token \"$content\"", "$name true", "false")
            }
            // Which of these the library skips when it decodes depends on its normalizer.
            if (entry.flag("special") && entry.flag("normalized")) {
                refuse("added token \"$content\"", "special and normalized", "only one of them")
            }
            require(content.isNotEmpty() && content !in ids) { "added token \"$content\" is empty or listed twice" }
            // The library looks content up, else numbers it after the vocabulary; a file that it wrote has these ids.
            val id = vocabulary.id(content).takeIf { it >= 0 } ?: next++
            if (entry["id"].asInt != id) refuse("added token \"$content\"", "id ${entry["id"]}", id)
            ids[content] = id
        }
        return small.getValue("added_tokens").asJsonArray.map { it.asJsonObject }.map {
            val content = it["content"].asString
            AddedToken(ids.getValue(content), content, it.flag("special"), it.flag("normalized"))
        }
    }

    private fun normalizer(element: JsonElement?): (String) -> String {
        val entry = element?.asJsonObject ?: return { it }
        return when (val type = entry["type"].asString) {
            "Replace" -> replace("normalizer", entry)
            "Sequence" -> entry["normalizers"].asJsonArray.map { normalizer(it) }.let { all ->
                { text -> all.fold(text) { done, step -> step(done) } }
            }
            else -> refuse("normalizer.type", type, "Replace or Sequence")
        }
    }

    private fun split(element: JsonElement?): (String) -> List<String> {
        val entry = element?.asJsonObject ?: return { listOf(it) }
        val type = entry["type"].asString
        if (type != "Split") refuse("pre_tokenizer.type", type, "Split")
        if (entry.flag("invert")) refuse("pre_tokenizer.invert", "true", "false")
        val pattern = pattern("pre_tokenizer", entry)
        return when (val behavior = entry["behavior"].asString) {
            "MergedWithPrevious" -> { text -> splitAfter(text, pattern) }
            "MergedWithNext" -> { text -> splitBefore(text, pattern) }
            else -> refuse("pre_tokenizer.behavior", behavior, "MergedWithPrevious or MergedWithNext")
        }
    }

    private fun decoder(element: JsonElement): (List<String>) -> List<String> {
        val entry = element.asJsonObject
        return when (val type = entry["type"].asString) {
            "Replace" -> replace("decoder", entry).let { step -> { tokens -> tokens.map(step) } }
            "ByteFallback" -> ::joinBytes
            "Fuse" -> { tokens -> listOf(tokens.joinToString("")) }
            "Sequence" -> entry["decoders"].asJsonArray.map { decoder(it) }.let { all ->
                { tokens -> all.fold(tokens) { done, step -> step(done) } }
            }
            else -> refuse("decoder.type", type, "Replace, ByteFallback, Fuse or Sequence")
        }
    }

    private fun replace(part: String, entry: JsonObject): (String) -> String {
        val (pattern, content) = pattern(part, entry) to entry["content"].asString
        return { text -> text.replace(pattern, content) }
    }

    private fun pattern(part: String, entry: JsonObject): String {
        val pattern = entry["pattern"].asJsonObject
        val literal = pattern["String"]?.asString
        if (literal.isNullOrEmpty()) refuse("$part.pattern", pattern, "a String that is not empty")
        return literal
    }

    private fun requireNull(name: String) {
        small[name]?.let { refuse(name, it, "null") }
    }

    private fun refuse(part: String, actual: Any, expected: Any): Nothing =
        throw InputError("$file: $part is $actual, expected $expected; export a checkpoint with Gemma's tokenizer")
}

private fun JsonObject.flag(name: String): Boolean = this[name]?.asBoolean ?: false

private fun JsonReader.forEachName(read: (String) -> Unit) {
    beginObject()
    while (hasNext()) read(nextName())
    endObject()
}
