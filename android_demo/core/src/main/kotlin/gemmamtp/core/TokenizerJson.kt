package gemmamtp.core

import com.google.gson.JsonElement
import com.google.gson.JsonObject
import com.google.gson.JsonParser
import com.google.gson.stream.JsonReader
import com.google.gson.stream.JsonToken
import java.io.File

/** A token that is found in the text before all else; `normalized` ones after the normalizer. */
internal class AddedToken(val id: Int, val content: String, val special: Boolean, val normalized: Boolean)

/** What a tokenizer.json asks for, as far as Gemma's files go. */
internal class TokenizerParts(
    val vocabulary: Vocabulary,
    val bpe: Bpe,
    val added: List<AddedToken>,
    val normalize: (String) -> String,
    val split: (String) -> List<String>,
    val decode: (List<String>) -> List<String>,
)

/**
 * Reads a tokenizer.json as a stream: Gemma's has 32 MB, and a phone's heap is not much larger.
 *
 * @throws InputError it cannot be read, or asks for something that Gemma's files do not use.
 */
internal fun readTokenizer(file: File): TokenizerParts =
    try {
        TokenizerJson(file).parts()
    } catch (error: OutOfMemoryError) {
        throw InputError("$file: does not fit in memory; close other apps and try again", error)
    } catch (error: Exception) { // Gson's reader has several that share no other type
        if (error is InputError) throw error
        val reason = (error.message ?: error.toString()).lineSequence().first()
        throw InputError("$file: cannot be read as a tokenizer ($reason); export the bundle again", error)
    }

/** One reading of a file. */
private class TokenizerJson(private val file: File) {
    private val small = HashMap<String, JsonElement>() // all but vocabulary and merges, by path
    private val vocabulary = Vocabulary()
    private val merges = Merges(vocabulary)
    private var mergesRead = false

    fun parts(): TokenizerParts {
        open(::readWhole)
        if (!mergesRead) open(::readWhole) // they may come before the vocabulary that they are read with
        require(mergesRead) { "model.vocab or model.merges is missing or empty" }
        merges.sort()
        nothing("truncation")
        nothing("padding")
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
            if (reader.peek() == JsonToken.STRING) { // as older files have it
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
        val found = if (name == "post_processor") return reader.skipValue() else JsonParser.parseReader(reader)
        if (!found.isJsonNull) small[name] = found
    }

    private fun bpe(): Bpe {
        val type = small["model.type"]
        if (type != null && type.asString != "BPE") refuse("model.type", type, "BPE")
        if (small["model.dropout"]?.asDouble ?: 0.0 != 0.0) nothing("model.dropout")
        for (name in listOf("continuing_subword_prefix", "end_of_word_suffix")) {
            if (small["model.$name"]?.asString?.isEmpty() == false) nothing("model.$name")
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
            val facts = token.asJsonObject
            val content = facts["content"].asString
            for (name in listOf("single_word", "lstrip", "rstrip")) {
                if (facts.flag(name)) refuse("added token \"$content\"", "$name true", "false")
            }
            // What of both the library skips when it decodes depends on its normalizer.
            if (facts.flag("special") && facts.flag("normalized")) {
                refuse("added token \"$content\"", "special and normalized", "only one of them")
            }
            require(content.isNotEmpty() && content !in ids) { "added token \"$content\" is empty or listed twice" }
            // The library goes by content and counts on from the vocabulary; a file that it wrote says the same.
            val id = vocabulary.id(content).takeIf { it >= 0 } ?: next++
            if (facts["id"].asInt != id) refuse("added token \"$content\"", "id ${facts["id"]}", id)
            ids[content] = id
        }
        return small.getValue("added_tokens").asJsonArray.map { it.asJsonObject }.map {
            val content = it["content"].asString
            AddedToken(ids.getValue(content), content, it.flag("special"), it.flag("normalized"))
        }
    }

    private fun normalizer(found: JsonElement?): (String) -> String {
        val facts = found?.asJsonObject ?: return { it }
        return when (val type = facts["type"].asString) {
            "Replace" -> replace("normalizer", facts)
            "Sequence" -> facts["normalizers"].asJsonArray.map { normalizer(it) }.let { all ->
                { text -> all.fold(text) { done, step -> step(done) } }
            }
            else -> refuse("normalizer.type", type, "Replace or Sequence")
        }
    }

    private fun split(found: JsonElement?): (String) -> List<String> {
        val facts = found?.asJsonObject ?: return { listOf(it) }
        val type = facts["type"].asString
        if (type != "Split") refuse("pre_tokenizer.type", type, "Split")
        if (facts.flag("invert")) refuse("pre_tokenizer.invert", "true", "false")
        val pattern = pattern("pre_tokenizer", facts)
        return when (val behavior = facts["behavior"].asString) {
            "MergedWithPrevious" -> { text -> splitAfter(text, pattern) }
            "MergedWithNext" -> { text -> splitBefore(text, pattern) }
            else -> refuse("pre_tokenizer.behavior", behavior, "MergedWithPrevious or MergedWithNext")
        }
    }

    private fun decoder(found: JsonElement): (List<String>) -> List<String> {
        val facts = found.asJsonObject
        return when (val type = facts["type"].asString) {
            "Replace" -> replace("decoder", facts).let { step -> { tokens -> tokens.map(step) } }
            "ByteFallback" -> ::joinBytes
            "Fuse" -> { tokens -> listOf(tokens.joinToString("")) }
            "Sequence" -> facts["decoders"].asJsonArray.map { decoder(it) }.let { all ->
                { tokens -> all.fold(tokens) { done, step -> step(done) } }
            }
            else -> refuse("decoder.type", type, "Replace, ByteFallback, Fuse or Sequence")
        }
    }

    private fun replace(part: String, facts: JsonObject): (String) -> String {
        val (pattern, content) = pattern(part, facts) to facts["content"].asString
        return { text -> text.replace(pattern, content) }
    }

    private fun pattern(part: String, facts: JsonObject): String {
        val pattern = facts["pattern"].asJsonObject
        val literal = pattern["String"]?.asString
        if (literal.isNullOrEmpty()) refuse("$part.pattern", pattern, "a String that is not empty")
        return literal
    }

    private fun nothing(name: String) {
        small[name]?.let { refuse(name, it, "null") }
    }

    private fun refuse(part: String, found: Any, expected: Any): Nothing =
        throw InputError("$file: $part is $found, expected $expected; export a checkpoint with Gemma's tokenizer")
}

private fun JsonObject.flag(name: String): Boolean = this[name]?.asBoolean ?: false

private fun JsonReader.forEachName(read: (String) -> Unit) {
    beginObject()
    while (hasNext()) read(nextName())
    endObject()
}
