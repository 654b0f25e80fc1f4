package gemmamtp.core

import com.google.gson.Gson
import com.google.gson.JsonArray
import com.google.gson.JsonNull
import com.google.gson.JsonObject
import com.google.gson.JsonParser
import java.io.File
import java.security.MessageDigest
import kotlin.test.Test
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

class TokenizerTest {
    private val cases = vectors("tokenizer.json")
    private val tokenizers = cases.rows("files").map { Tokenizer(File(repository, it.string("file")), it["bos"].asInt) }

    private fun tokenizer(row: JsonObject) = tokenizers[row["file"].asInt]

    @Test
    fun `texts become the ids of the tokenizers library`() {
        val rows = cases.rows("texts")
        assertTrue(rows.size > 100)
        for (row in rows) {
            val ids = tokenizer(row).encode(row.string("text").repeat(row["times"]?.asInt ?: 1)).toList()
            if (row.has("ids")) {
                assertEquals(row.ints("ids"), ids, row.string("text"))
            } else {
                assertEquals(row["count"].asInt, ids.size)
                val digest = MessageDigest.getInstance("SHA-256").digest(ids.joinToString(",").toByteArray())
                assertEquals(row.string("sha256"), digest.joinToString("") { "%02x".format(it) })
            }
        }
    }

    @Test
    fun `ids become its texts`() {
        for (row in cases.rows("streams")) assertEquals(row.string("text"), tokenizer(row).decode(row.ints("ids")))
    }

    @Test
    fun `streams return what those of runtime_ref return`() {
        for (row in cases.rows("streams")) {
            val ids = row.ints("ids")
            val channels = row.getAsJsonObject("channels")?.asMap().orEmpty()
                .mapValues { (_, marks) -> marks.asJsonArray.let { it[0].asInt to it[1].asInt } }
            val forms = row.getAsJsonObject("parts")?.asMap().orEmpty()
                .mapValues { (_, form) -> form.asJsonObject.let { PartForm(it.string("before"), it.string("after")) } }
            val prompt = if (row.has("prompt")) row.ints("prompt") else emptyList()
            val stream = TextStream(tokenizer(row)::decode, row.texts("stop"), PartTracker(channels, setOf(1), prompt), forms)
            val pieces = ids.mapIndexed { i, id -> stream.add(id, i == ids.size - 1) }
            assertEquals(row.texts("pieces"), pieces.map { it.text }, "$ids")
            assertEquals(row["stopped"].asBoolean, stream.stopped)
            row.getAsJsonArray("of_parts")?.let { of ->
                assertEquals(of, Gson().toJsonTree(pieces.map { listOf(it.part, it.partText) }))
            }
            row.getAsJsonArray("opened")?.let { opened ->
                val actual = stream.channels.map { listOf(it.name, it.start, it.text, it.closed) }
                assertEquals(opened, Gson().toJsonTree(actual))
            }
        }
    }

    @Test
    fun `flush returns incomplete characters`() {
        val stream = tokenizers[0].stream()
        val first = tokenizers[0].encode("é")[1]
        assertEquals("", stream.add(first).text)
        assertEquals("\uFFFD", stream.flush())
        assertEquals("", stream.flush())
    }

    @Test
    fun `halves of characters are refused`() {
        for (text in listOf("a\uD83D", "\uDE00b", "\uDE00\uD83D")) {
            val message = assertFailsWith<InputError> { tokenizers[0].encode(text) }.message
            assertEquals("the prompt is not valid UTF-8 (surrogates not allowed); pass well-formed text", message)
        }
        tokenizers[0].encode("\uD83D\uDE00")
    }

    @Test
    fun `padding and truncation that a training left are not applied`() {
        val trained = shape()
        trained.add("truncation", json("""{"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}"""))
        trained.add("padding", json("""{"strategy": {"Fixed": 8}, "direction": "Right", "pad_id": 0, "pad_token": "<pad>"}"""))
        for (text in listOf("a", "the fan in the inn")) {
            assertEquals(tokenizers[1].encode(text).toList(), read(trained).encode(text).toList())
        }
    }

    @Test
    fun `merges may come first, as text, and more than once`() {
        val (whole, ids) = shape() to tokenizers[1].encode("the fan in the inn")
        val model = whole.getAsJsonObject("model")
        val merges = JsonArray()
        val pairs = model.getAsJsonArray("merges").map { it.asJsonArray }.map { "${it[0].asString} ${it[1].asString}" }
        for (pair in pairs.reversed() + pairs) merges.add(pair)
        val turned = JsonObject()
        turned.add("merges", merges)
        for ((name, part) in model.entrySet()) if (name != "merges") turned.add(name, part)
        whole.add("model", turned)
        assertEquals(ids.toList(), read(whole).encode("the fan in the inn").toList())
    }

    @Test
    fun `what Gemma's files do not use is refused in one line`() {
        val cases = listOf<Pair<String, (JsonObject) -> Unit>>(
            "model.type is \"Unigram\", expected BPE" to { it.part("model").addProperty("type", "Unigram") },
            "model.dropout is 0.1" to { it.part("model").addProperty("dropout", 0.1) },
            "model.end_of_word_suffix is \"</w>\"" to { it.part("model").addProperty("end_of_word_suffix", "</w>") },
            "model.unk_token <none> is not" to { it.part("model").addProperty("unk_token", "<none>") },
            "model.vocab or model.merges is missing" to { it.part("model").remove("merges") },
            "model.vocab is NUMBER" to { it.part("model").addProperty("vocab", 3) },
            "merge 1, \"no\" and \"such\"" to { it.part("model").add("merges", json("""["a n", ["no", "such"]]""")) },
            "merge \"a b c\" is not" to { it.part("model").add("merges", json("""["a b c"]""")) },
            "normalizer.type is NFC" to { it.add("normalizer", json("""{"type": "NFC"}""")) },
            "normalizer.pattern is" to {
                it.add("normalizer", json("""{"type": "Replace", "pattern": {"Regex": " +"}, "content": "x"}"""))
            },
            "pre_tokenizer.type is ByteLevel" to { it.add("pre_tokenizer", json("""{"type": "ByteLevel"}""")) },
            "pre_tokenizer.behavior is Isolated" to { it.part("pre_tokenizer").addProperty("behavior", "Isolated") },
            "pre_tokenizer.invert is true" to { it.part("pre_tokenizer").addProperty("invert", true) },
            "decoder is none" to { it.add("decoder", JsonNull.INSTANCE) },
            "decoder.type is Metaspace" to { it.add("decoder", json("""{"type": "Metaspace"}""")) },
            "added token \"<bos>\" is lstrip true" to { it.added(2).addProperty("lstrip", true) },
            "added token \"<bos>\" is special and normalized" to { it.added(2).addProperty("normalized", true) },
            "added token \"<bos>\" is id 7, expected 2" to { it.added(2).addProperty("id", 7) },
            "added token \"\" is empty" to { it.added(2).addProperty("content", "") },
        )
        for ((message, change) in cases) {
            val error = assertFailsWith<InputError>(message) { read(shape().also(change)) }.message!!
            assertContains(error, message)
            assertTrue("\n" !in error && "; export" in error, error)
        }
    }

    @Test
    fun `no JSON and no file are refused in one line`() {
        val file = File.createTempFile("tokenizer", ".json")
        for (text in listOf("", "[]", "{", "{\"model\": 3}", "{\"model\": {\"vocab\": {\"a\": \"b\"}}}")) {
            file.writeText(text)
            val error = assertFailsWith<InputError>(text) { Tokenizer(file, 2) }.message!!
            assertTrue("\n" !in error && "cannot be read as a tokenizer" in error, error)
        }
        file.delete()
        assertContains(assertFailsWith<InputError> { Tokenizer(file, 2) }.message!!, "is missing")
    }

    @Test
    fun `splits keep one pattern with its neighbour`() {
        assertEquals(listOf("a_", "_", "b"), splitAfter("a__b", "_"))
        assertEquals(listOf("_", "a_"), splitAfter("_a_", "_"))
        assertEquals(listOf("a", "_", "_b"), splitBefore("a__b", "_"))
        assertEquals(listOf("_a", "_"), splitBefore("_a_", "_"))
        assertEquals(listOf("a", "__b"), splitBefore("a__b", "__"))
    }

    private fun shape() = vectors("gemma_shape.json")

    private fun read(whole: JsonObject): Tokenizer {
        val file = File.createTempFile("tokenizer", ".json")
        try {
            file.writeText(whole.toString())
            return Tokenizer(file, 2)
        } finally {
            file.delete()
        }
    }

    private fun json(text: String) = JsonParser.parseString(text)
    private fun JsonObject.part(name: String) = getAsJsonObject(name)
    private fun JsonObject.added(index: Int) = getAsJsonArray("added_tokens")[index].asJsonObject
}
