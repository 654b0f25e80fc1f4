package gemmamtp.core

import com.google.gson.JsonArray
import com.google.gson.JsonElement
import com.google.gson.JsonObject
import com.google.gson.JsonParser
import com.google.gson.JsonPrimitive
import java.io.File
import java.io.IOException
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.util.Random
import kotlin.test.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertFalse
import kotlin.test.assertTrue

private const val METADATA = "__metadata__"

/** A file in the safetensors format, read and written by its public rules alone. */
private class Raw(val header: JsonElement, val data: ByteArray) {
    fun bytes(): ByteArray = header.toString().toByteArray().let { file(it + ByteArray(8 - it.size % 8) { 32 }, data) }

    /** The bytes of a tensor. */
    fun bytes(name: String): ByteBuffer {
        val offsets = header.asJsonObject.getAsJsonObject(name).getAsJsonArray("data_offsets").map { it.asInt }
        return ByteBuffer.wrap(data, offsets[0], offsets[1] - offsets[0]).slice().order(ByteOrder.LITTLE_ENDIAN)
    }
}

private fun file(header: ByteArray, data: ByteArray, length: Long = header.size.toLong()): ByteArray =
    ByteBuffer.allocate(8).order(ByteOrder.LITTLE_ENDIAN).putLong(length).array() + header + data

private fun raw(bytes: ByteArray): Raw {
    val length = ByteBuffer.wrap(bytes).order(ByteOrder.LITTLE_ENDIAN).getLong(0).toInt()
    val header = JsonParser.parseString(String(bytes, 8, length))
    return Raw(header, bytes.copyOfRange(8 + length, bytes.size))
}

/** A session goes on as if it had never been closed, or is refused in one line. */
class SessionFileTest {
    private fun read(stream: Stream, count: Int = Int.MAX_VALUE): List<Pair<Int, List<Int>>> {
        val written = ArrayList<Pair<Int, List<Int>>>()
        while (written.size < count && stream.hasNext()) written.add(stream.next().id to stream.lastRound!!.drafts)
        return written
    }

    private fun tokens(random: Random, most: Int) = List(1 + random.nextInt(most)) { random.nextInt(FAKE_VOCAB) }

    /** What is in the file: rows of token ids, and nothing of rejected drafts. */
    private fun checkRows(raw: Raw, rowsFirst: Boolean) {
        val tokens = raw.bytes("tokens").asIntBuffer().let { ids -> List(ids.remaining()) { ids.get(it) } }
        val windowStart = raw.header.asJsonObject.getAsJsonObject(METADATA).get("window_start").asInt
        for ((name, first) in listOf("key_full" to 0, "key_sliding" to windowStart)) {
            val entry = raw.header.asJsonObject.getAsJsonObject(name)
            val rows = entry.getAsJsonArray("shape")[if (rowsFirst) 0 else 1].asInt
            assertEquals(minOf((tokens.size - first + 255) / 256 * 256, if (first > 0) 256 else 901), rows)
            val bytes = raw.bytes(name)
            for (head in 0..1) for (row in 0 until rows) {
                val at = if (rowsFirst) row * 2 + head else head * rows + row
                val held = if (entry.get("dtype").asString == "F16") bytes.getShort(2 * at).toInt() else bytes.getFloat(4 * at).toInt()
                assertEquals(tokens.getOrElse(first + row) { 0 }, held, "$name, head $head, row $row")
            }
        }
    }

    /** Saved after any token, with rejected drafts and moved windows: the same tokens, drafts and reuse as never closed. */
    @Test
    fun openedSessionsGoOnAsIfNeverClosed() = inTemporaryDirectory { directory ->
        val random = Random(0)
        val file = File(directory, "session")
        val rowsFirst = listOf("rows", "num_key_value_heads", "head_dim")
        var moved = 0
        for (run in 0 until 24) {
            val type = KVType.values()[run % 2]
            val layout = if (run % 4 < 2) HEADS_FIRST else rowsFirst
            val fullType = if (run % 5 == 0) KVType.FLOAT16 else type
            fun decoder() = FakeBundle(directory, type = type, layout = layout, fullType = fullType).decoder()
            val conversation = decoder().conversation()
            var text = emptyList<Int>()
            for (most in listOf(250, 100)) {
                text = text + tokens(random, most)
                val stream = conversation.stream(text.toIntArray(), Options(100, random.nextInt(6)))
                text = text + read(stream, random.nextInt(80)).map { it.first }
            }
            conversation.save(file)
            val saved = file.readBytes()
            assertEquals(0, (saved.size - raw(saved).data.size) % 4096)
            val dtypes = raw(saved).header.asJsonObject.entrySet().mapNotNull { it.value.asJsonObject.get("dtype")?.asString }
            assertEquals(dtypes.take(2).sortedDescending() + "I32", dtypes)
            checkRows(raw(saved), layout == rowsFirst)
            if (conversation.cache.windowStart > 0) moved++

            val opened = decoder().openSession(file)
            assertEquals(conversation.cache.tokens, opened.cache.tokens)
            val again = File(directory, "again")
            opened.save(again)
            assertContentEquals(saved, again.readBytes())
            val (manifest, planner) = decoder().manifest to DraftLength(5, Costs(5, 2))
            val copied = readSession(file, manifest, planner, mapped = false) // as if it might only be read
            writeSession(again, manifest, copied, planner)
            assertContentEquals(saved, again.readBytes())
            val next = text.take(text.size - random.nextInt(3)) + tokens(random, 100)
            val options = Options(80, random.nextInt(6), Sampling(temperature = random.nextInt(2).toDouble(), seed = 3))
            val (expected, found) = listOf(conversation, opened).map { it.stream(next.toIntArray(), options) }
            val first = read(found, 1)
            assertContentEquals(saved, file.readBytes()) // running does not change it
            if (random.nextBoolean()) assertTrue(file.delete()) else conversation.save(file)
            assertEquals(read(expected), first + read(found))
            assertEquals(expected.stats.reusedTokens, found.stats.reusedTokens)
            assertTrue(found.stats.reusedTokens > 0)
        }
        assertTrue(moved in 4..20, "$moved windows had moved")
    }

    /** A new one, and one whose window had moved before another prompt failed. */
    @Test
    fun emptyConversationsAreSavedToo() = inTemporaryDirectory { directory ->
        val file = File(directory, "session")
        for (used in listOf(false, true)) {
            val bundle = FakeBundle(directory)
            val conversation = bundle.decoder().conversation()
            if (used) {
                conversation.stream(IntArray(400) { 3 }, Options(1)).next()
                bundle.target.left = 1
                assertFailsWith<InputError> { conversation.stream(IntArray(9) { 4 }, Options(1)).next() }
            }
            conversation.save(file)
            val opened = FakeBundle(directory).decoder().openSession(file)
            assertEquals(listOf(0L, 900L), listOf(opened.numBytes, opened.tokensLeft.toLong()))
            assertEquals(chosenAfter(listOf(3)), opened.stream(intArrayOf(3), Options()).next().id)
        }
    }

    @Test
    fun whatThePlannerLearntGoesAlong() = inTemporaryDirectory { directory ->
        val file = File(directory, "session")
        val costs = Costs(5, 2)
        val planners = List(3) { DraftLength(5, costs) }
        val decoders = planners.map { FakeBundle(directory).decoder(it) }
        read(decoders[0].stream(IntArray(30) { it }, Options(300, null)))
        decoders[0].conversation().save(file)
        decoders[1].openSession(file)
        assertEquals(planners[0].toJson(), planners[1].toJson())
        val plans = planners.map { planner ->
            List(20) {
                val plan = planner.plan(listOf(DRAFTER to 5, "lookup of 2" to 3))
                planner.learn(plan.source, plan.numDraftTokens, plan.numDraftTokens * it / 30)
                planner.recordLoss(plan, 1, plan.numDraftTokens)
                plan.source to plan.numDraftTokens
            }
        }
        assertEquals(plans[0], plans[1])
        val learnt = planners[2].toJson()
        assertEquals(planners[0].toJson(), planners[1].toJson())
        assertTrue(learnt != planners[1].toJson())
        decoders[2].openSession(file)
        assertEquals(learnt, planners[2].toJson()) // its own is newer
    }

    private fun obj(raw: JsonElement, name: String) = raw.asJsonObject.getAsJsonObject(name)

    /** What the error says, and what is done to the header. */
    private val spoiltHeaders: List<Pair<String, (JsonObject) -> Unit>> = listOf(
        "__metadata__ is null" to { it.remove(METADATA) },
        "format is \"other\"" to { obj(it, METADATA).addProperty("format", "other") },
        "version is null" to { obj(it, METADATA).remove("version") },
        "version is \"2\", this version reads 1; update" to { obj(it, METADATA).addProperty("version", "2") },
        "version is \"1.0\", this version reads 1; run" to { obj(it, METADATA).addProperty("version", "1.0") },
        "version is 1, expected a text" to { obj(it, METADATA).addProperty("version", 1) },
        "another bundle, whose manifest's sha256 is \"ab\\ncd\"" to { obj(it, METADATA).addProperty("bundle", "ab\ncd") },
        "window_start is 0" to { obj(it, METADATA).addProperty("window_start", "0") },
        "window_start is 129" to { obj(it, METADATA).addProperty("window_start", "129") },
        "window_start is -128" to { obj(it, METADATA).addProperty("window_start", "-128") },
        "window_start is 384" to { obj(it, METADATA).addProperty("window_start", "384") },
        "window_start is ²" to { obj(it, METADATA).addProperty("window_start", "²") },
        "JsonSyntaxException" to { obj(it, METADATA).addProperty("planner", "{") },
        "the planner is no object" to { obj(it, METADATA).addProperty("planner", "[]") },
        "sources of the planner" to { obj(it, METADATA).addProperty("planner", "{\"loss_passes\": 0}") },
        "loss_passes is null" to { obj(it, METADATA).addProperty("planner", "{\"sources\": {}}") },
        "loss_passes is \"NaN\"" to { obj(it, METADATA).addProperty("planner", "{\"sources\": {}, \"loss_passes\": NaN}") },
        "the estimate of \"x\"" to { obj(it, METADATA).addProperty("planner", "{\"sources\": {\"x\": 1}, \"loss_passes\": 0}") },
        "accepted of an estimate is no list of 5" to { header ->
            val small = DraftLength(4, Costs(4)).apply { learn(DRAFTER, 4, 2) }
            obj(header, METADATA).addProperty("planner", small.toJson().toString())
        },
        "it has the tensors" to { it.remove("key_sliding") },
        "tokens are missing" to { it.remove("tokens") },
        "it has the tensors" to { it.add("more", it.get("tokens")) },
        "key_full is F16" to { obj(it, "key_full").addProperty("dtype", "F16") },
        "dtype of key_full is null" to { obj(it, "key_full").remove("dtype") },
        "key_full is F32 [2, 512, 2], expected F32 [2, 512, 1]" to { obj(it, "key_full").getAsJsonArray("shape").set(2, JsonPrimitive(2)) },
        "key_full is F32 [2, 768, 1]" to { obj(it, "key_full").getAsJsonArray("shape").set(1, JsonPrimitive(768)) },
        "shape of key_full has -2" to { obj(it, "key_full").getAsJsonArray("shape").set(0, JsonPrimitive(-2)) },
        "shape of key_full has 2.0" to { obj(it, "key_full").getAsJsonArray("shape").set(0, JsonPrimitive(2.0)) },
        "shape of tokens is [901], expected at most 900" to { obj(it, "tokens").getAsJsonArray("shape").set(0, JsonPrimitive(901)) },
        "shape of tokens is [9223372036854775807]" to
            { obj(it, "tokens").getAsJsonArray("shape").set(0, JsonPrimitive(Long.MAX_VALUE)) },
        "shape of tokens is []" to { obj(it, "tokens").add("shape", JsonArray()) },
        "data_offsets of tokens is null" to { obj(it, "tokens").remove("data_offsets") },
        "data_offsets of tokens are [6144, 4000]" to { obj(it, "tokens").getAsJsonArray("data_offsets").set(1, JsonPrimitive(4000)) },
        "tokens has 1596 bytes, expected 1600" to { obj(it, "tokens").getAsJsonArray("data_offsets").set(1, JsonPrimitive(7740)) },
        "key_full begins at byte 0 of the data, expected 2048" to { header ->
            obj(header, "key_sliding").add("data_offsets", JsonParser.parseString("[0, 2048]"))
        },
        "tokens begins at byte 6148 of the data, expected 6144" to { header ->
            obj(header, "tokens").add("data_offsets", JsonParser.parseString("[6148, 7748]"))
        },
        "tokens is [], expected an object" to { it.add("tokens", JsonArray()) },
    )

    @Test
    fun everythingElseIsRefusedInOneLine() = inTemporaryDirectory { directory ->
        val file = File(directory, "session")
        val conversation = FakeBundle(directory, digest = "12ab").decoder().conversation()
        conversation.stream(IntArray(400) { it % FAKE_VOCAB }, Options(1)).next()
        conversation.save(file)
        val whole = file.readBytes()
        val header = raw(whole).header.toString().toByteArray()
        val data = raw(whole).data
        val decoder = FakeBundle(directory, digest = "12ab").decoder()

        fun check(expected: String, bytes: ByteArray?) {
            if (bytes == null) file.delete() else file.writeBytes(bytes)
            val message = assertFailsWith<InputError>(expected) { decoder.openSession(file) }.message!!
            assertTrue(message.startsWith("$file: ") && expected in message && '\n' !in message && "; " in message, "$expected: $message")
            assertEquals(bytes != null, file.exists())
            if (bytes != null) assertContentEquals(bytes, file.readBytes())
        }
        check("no such file", null)
        check("it has 0 bytes, expected at least 8", ByteArray(0))
        check("it has 7 bytes", whole.copyOf(7))
        for (length in listOf(-1, Long.MIN_VALUE, Long.MAX_VALUE, whole.size - 7L)) {
            check("its header's length is $length, expected 0 to ${whole.size - 8}", file(header, data, length).copyOf(whole.size))
        }
        check("expected 0 to 16777216", file(ByteArray((16 shl 20) + 1), data))
        check("its header is no object", file(ByteArray(0), data))
        check("its header is no object", file("[1]".toByteArray(), data))
        check("cannot be read as JSON", file("{\"tokens\": ".toByteArray(), data))
        check("session", file("{\"$METADATA\": ${"[".repeat(100_000)}".toByteArray(), data))
        check("session", file("{\"$METADATA\": ${"[".repeat(100_000)}${"]".repeat(100_000)}}".toByteArray(), data))
        check("it has 7743 bytes of data, its header says 7744", whole.copyOf(whole.size - 1))
        check("it has 7745 bytes of data", whole.copyOf(whole.size + 1))
        check("it has 0 bytes of data", whole.copyOf(whole.size - data.size))
        check("key_full begins at byte", file(header + ByteArray(6 - header.size % 4) { 32 }, data))
        check("token 399 is 50, expected 0 to 49", whole.copyOf().also { it[whole.size - 4] = 50 })
        check("token 0 is -1", whole.copyOf().also { it.fill(-1, it.size - 1600, it.size - 1596) })
        for ((expected, spoil) in spoiltHeaders) {
            check(expected, Raw(raw(whole).header.also { spoil(it.asJsonObject) }, data).bytes())
        }
        // What another writer may do: other white space, keys that nobody knows, another order, another alignment.
        val other = raw(whole).header.asJsonObject
        obj(other, METADATA).addProperty("messages", "[]")
        val reordered = JsonObject().apply { other.keySet().reversed().forEach { add(it, other.get(it)) } }
        val text = reordered.toString().toByteArray()
        file.writeBytes(file(text + ByteArray(8 - text.size % 4) { 32 }, data))
        assertEquals(conversation.cache.tokens, decoder.openSession(file).cache.tokens)
    }

    @Test
    fun spoiltBytesOfTheHeaderGiveASessionOrOneLine() = inTemporaryDirectory { directory ->
        val random = Random(5)
        val file = File(directory, "session")
        val decoder = FakeBundle(directory).decoder()
        read(decoder.stream(IntArray(100) { it % FAKE_VOCAB }, Options(20, null)))
        decoder.save(file)
        val whole = file.readBytes()
        val headerBytes = raw(whole).header.toString().length + 8
        var refused = 0
        repeat(3000) {
            val spoilt = whole.copyOf()
            repeat(1 + random.nextInt(3)) { spoilt[random.nextInt(headerBytes)] = (32 + random.nextInt(95)).toByte() }
            file.writeBytes(spoilt)
            try {
                decoder.openSession(file)
            } catch (error: InputError) {
                refused++
                assertFalse('\n' in error.message!!)
            }
        }
        assertTrue(refused > 2000, "$refused refused")
    }

    private fun Decoder.save(file: File) {
        val saved = conversation()
        saved.stream(IntArray(100) { it % FAKE_VOCAB }, Options(1)).next()
        saved.save(file)
    }

    @Test
    fun aFileIsWrittenWholeOrNotAtAll() = inTemporaryDirectory { directory ->
        val (file, other) = File(directory, "session") to File(directory, "session.new")
        val decoder = FakeBundle(directory).decoder()
        other.writeText("another file")
        val before = directory.list()!!.toSet()
        decoder.save(file)
        val old = file.readBytes()
        assertFailsWith<IOException> {
            writeWhole(file) {
                it.write(old, 0, 100)
                throw IOException("no space left")
            }
        }
        assertEquals(before + "session", directory.list()!!.toSet()) // nothing is left aside
        assertContentEquals(old, file.readBytes())
        val missing = File(directory, "none/session")
        val message = assertFailsWith<InputError> { decoder.save(missing) }.message!!
        assertTrue(message.startsWith("$missing: cannot be written") && '\n' !in message, message)
        assertEquals("another file", other.readText())
    }

    @Test
    fun whatAKilledProcessLeftIsRemoved() = inTemporaryDirectory { directory ->
        val (old, new) = listOf("1", "2").map { File(directory, ".session.partial-$it").apply { writeText("half") } }
        old.setLastModified(System.currentTimeMillis() - 7_200_000)
        val decoder = FakeBundle(directory).decoder()
        decoder.save(File(directory, "session"))
        assertFalse(old.exists())
        assertTrue(new.exists()) // may be another process's, which still writes
    }
}
