package gemmamtp.core

import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.LongBuffer
import java.nio.ShortBuffer
import java.util.Random
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

private const val WINDOW = 40
private const val VOCAB = 50

/** The token that the fake target chooses after a text: from sums over what its full and sliding layer attend to. */
private fun chosenAfter(text: List<Int>): Int {
    val window = text.takeLast(WINDOW)
    val sum = text.sum() + window.withIndex().sumOf { (i, token) -> token * (text.size - window.size + i) % 7 }
    return if (sum % 3 == 0) sum % VOCAB else (text.last() + 1) % VOCAB
}

/** A target with two buffers of two heads whose rows hold the token id, or a drafter that drafts the next id. */
private class FakeGraph(private val isTarget: Boolean, private val rowsFirst: Boolean) : BoundGraph {
    private var cache = emptyMap<String, Tensor>()
    var closed = false
    var passes = 0
    var left = 0 // of the passes up to the one that spoils its rows and fails

    override fun bind(cache: Map<String, Tensor>) {
        this.cache = cache
    }

    private fun index(name: String, head: Int, row: Int): Int {
        val (heads, rows) = cache.getValue(name).shape.let { if (rowsFirst) it[1] to it[0] else it[0] to it[1] }
        assertTrue(row < rows, "row $row of $name, which has $rows")
        return if (rowsFirst) row * heads.toInt() + head else head * rows.toInt() + row
    }

    private fun put(name: String, head: Int, row: Int, token: Int) {
        when (val data = cache.getValue(name).data) {
            is FloatBuffer -> data.put(index(name, head, row), token.toFloat())
            is ShortBuffer -> data.put(index(name, head, row), token.toShort())
        }
    }

    private fun get(name: String, head: Int, row: Int): Int = when (val data = cache.getValue(name).data) {
        is FloatBuffer -> data.get(index(name, head, row)).toInt()
        else -> (data as ShortBuffer).get(index(name, head, row)).toInt()
    }

    override fun run(inputs: Map<String, Tensor>): Map<String, Tensor> {
        val tokens = inputs.getValue("embedded").let { at -> List(at.shape[0].toInt()) { (at.data as FloatBuffer).get(it).toInt() } }
        val (position, windowStart) = listOf("position", "window_start").map { (inputs.getValue(it).data as LongBuffer).get(0).toInt() }
        if (!isTarget) {
            val next = (tokens[0] + 1L) % VOCAB
            return mapOf("draft_token" to Tensor(longs(1).put(0, next), 1), "next_state" to Tensor(floats(1), 1, 1))
        }
        passes++
        val spoilt = --left == 0
        assertEquals(0, tokens.size % 2)
        assertEquals(0, windowStart % SLIDE_ROWS)
        for ((i, token) in tokens.withIndex()) {
            for (head in 0..1) {
                put("key_full", head, position + i, if (spoilt) -1 else token)
                put("key_sliding", head, position + i - windowStart, if (spoilt) -2 else token)
            }
        }
        if (spoilt) throw InputError("the graph cannot run")
        val rows = inputs.getValue("output_rows").let { at -> List(at.shape[0].toInt()) { (at.data as LongBuffer).get(it).toInt() } }
        val logits = floats(rows.size * 2)
        val ids = longs(rows.size * 2)
        for ((i, row) in rows.withIndex()) {
            val end = position + row + 1
            val seen = List(end) { at ->
                val head = at % 2
                val full = get("key_full", head, at)
                if (at >= end - WINDOW) {
                    assertEquals(full, get("key_sliding", head, at - windowStart), "position $at")
                }
                full
            }
            logits.put(2 * i, 1f)
            ids.put(2 * i, chosenAfter(seen).toLong())
        }
        return mapOf(
            "top_logits" to Tensor(logits, rows.size.toLong(), 2),
            "top_ids" to Tensor(ids, rows.size.toLong(), 2),
            "state" to Tensor(floats(rows.size), rows.size.toLong(), 1),
        )
    }

    override fun close() {
        closed = true
    }
}

/** The cache grows, moves and rolls back without losing a row. */
class GraphEngineTest {
    private var graphs = emptyMap<String, FakeGraph>()

    private fun engine(
        directory: File,
        numTokens: Int = 16,
        type: KVType = KVType.FLOAT32,
        layout: List<String> = HEADS_FIRST,
    ): GraphEngine {
        val rowsFirst = layout[0] == "rows"
        graphs = mapOf("target" to FakeGraph(true, rowsFirst), "drafter" to FakeGraph(false, rowsFirst))
        val numbers = ByteBuffer.allocate(4 * VOCAB).order(ByteOrder.LITTLE_ENDIAN)
        for (token in 0 until VOCAB) numbers.putFloat(token.toFloat())
        File(directory, "rows").writeBytes(numbers.array())
        val metadata = TableMetadata(VOCAB, 1, 4, "float32", 1, Rows(listOf(Part("rows", 0, VOCAB))), null)
        val manifest = smallManifest(
            vocabSize = VOCAB,
            maxSeqLen = 900,
            maxDraftTokens = 5,
            slidingWindow = WINDOW,
            numTokens = numTokens,
            rowMultiple = 2,
            kv = listOf("key_full", "key_sliding").map { KVBuffer(it, it == "key_sliding", 2, 1, type, layout) },
            tables = listOf(EMBEDDING, PER_LAYER).associateWith { metadata },
        )
        return loadEngine(directory, manifest, { _, _, _ -> graphs })
    }

    @Test
    fun everyRowIsWhereItBelongs() = inTemporaryDirectory { directory ->
        for (drafts in listOf(0, 1, 4, 5, null)) {
            for (prompt in listOf(listOf(3), List(17) { it }, List(300) { it * 7 % VOCAB })) {
                val engine = engine(directory)
                val options = Options(2000, drafts)
                val written = Rounds(engine, prompt, options, Stats(), DraftLength(5, Costs(5, 2))).asSequence()
                val text = prompt.toMutableList()
                for (token in written.flatMap { it.tokens }) {
                    assertEquals(chosenAfter(text), token, "token ${text.size} with $drafts drafts")
                    text.add(token)
                }
                assertEquals(900, text.size)
                assertTrue(engine.cache.windowStart >= 900 - WINDOW - 3 * SLIDE_ROWS)
            }
        }
    }

    @Test
    fun everyTypeAndLayoutOfTheCache() = inTemporaryDirectory { directory ->
        val rowsFirst = listOf("rows", "num_key_value_heads", "head_dim")
        for ((type, layout) in listOf(KVType.FLOAT16 to HEADS_FIRST, KVType.FLOAT32 to rowsFirst, KVType.FLOAT16 to rowsFirst)) {
            val engine = engine(directory, type = type, layout = layout)
            val text = MutableList(300) { it * 7 % VOCAB }
            val written = Rounds(engine, text.toList(), Options(2000, 4), Stats(), DraftLength(5, Costs(5, 2))).asSequence()
            for (token in written.flatMap { it.tokens }) {
                assertEquals(chosenAfter(text), token, "token ${text.size}, $type $layout")
                text.add(token)
            }
            assertEquals(900, text.size)
        }
    }

    @Test
    fun resumesWhereTheWindowHasAllRows() = inTemporaryDirectory { directory ->
        val engine = engine(directory)
        engine.prefill(List(600) { 3 }, Sampling())
        assertTrue(engine.cache.canResume(599))
        assertEquals(false, engine.cache.canResume(100))
    }

    /** Texts that share beginnings, cancelled or failing at any chunk, or not: nothing is run in vain, and nothing is lost. */
    @Test
    fun promptsThatEndEarlyLoseNothing() = inTemporaryDirectory { directory ->
        val random = Random(0)
        val engine = engine(directory)
        val target = graphs.getValue("target")
        val decoder = Decoder(engine, null, null, DraftLength(5, Costs(5, 2)))
        var text = listOf(1)
        repeat(150) {
            val new = List(1 + random.nextInt(70)) { random.nextInt(VOCAB) }
            val prompt = (text.take(1 + random.nextInt(text.size)) + new).take(880)
            val reused = engine.cache.reusable(prompt)
            val stopsAfter = random.nextInt((prompt.size - reused + 15) / 16 + 1)
            val ends = reused + 16 * stopsAfter
            val (cancels, fails) = random.nextInt(3).let { (it == 1) to (it == 2 && stopsAfter > 0) }
            val (passes, seen) = target.passes to ArrayList<Int>()
            if (fails) target.left = stopsAfter
            lateinit var stream: Stream
            stream = decoder.stream(prompt.toIntArray(), Options(8, 3)) { done, total ->
                assertEquals(prompt.size, total)
                seen.add(done)
                if (cancels && seen.size == stopsAfter + 1) stream.cancel()
            }
            text = prompt
            if (fails) {
                assertFailsWith<InputError> { stream.next() }
                assertEquals(prompt.take(ends - 16), engine.cache.tokens)
            } else if (cancels) {
                assertEquals(false, stream.hasNext())
                assertEquals("cancelled", stream.stats.finishReason)
                assertEquals(stopsAfter, target.passes - passes)
                assertEquals((0..stopsAfter).map { minOf(reused + 16 * it, prompt.size) }, seen)
                if (stopsAfter > 0) assertEquals(prompt.take(ends), engine.cache.tokens)
            } else {
                for (token in stream) text = text.also { assertEquals(chosenAfter(it), token.id) } + token.id
                assertEquals(prompt.size + 8, text.size)
                assertEquals(prompt.size, seen.last())
            }
            assertEquals(reused, stream.stats.reusedTokens)
        }
    }

    /** Memory for so many of two larger buffers is there: what was in the cache goes on as if nothing had been tried. */
    @Test
    fun growingHappensToAllBuffersOrToNone() = inTemporaryDirectory { directory ->
        for (given in 0..1) {
            val engine = engine(directory, numTokens = 200)
            var left = Int.MAX_VALUE
            engine.cache = Cache(engine.manifest) { if (left-- > 0) direct(it) else throw OutOfMemoryError() }
            val text = List(250) { it * 7 % VOCAB }
            engine.prefill(text, Sampling())
            val tensors = engine.cache.tensors
            left = given
            assertFailsWith<OutOfMemoryError> { engine.prefill(text + List(10) { it }, Sampling(), 250) }
            assertTrue(tensors === engine.cache.tensors)
            assertEquals(text, engine.cache.tokens)
            assertEquals(listOf(chosenAfter(text + 3)), engine.prefill(text + 3, Sampling(), 250).tokens)
            left = 2
            val longer = text + List(10) { it }
            assertEquals(listOf(chosenAfter(longer)), engine.prefill(longer, Sampling(), 250).tokens)
            assertEquals(0, left)
        }
    }

    @Test
    fun anotherCacheTakesItsPlace() = inTemporaryDirectory { directory ->
        val engine = engine(directory)
        val caches = List(2) { Cache(engine.manifest) }
        var texts = listOf(List(40) { it }, List(300) { it * 7 % VOCAB })
        repeat(3) {
            texts = texts.mapIndexed { i, text ->
                engine.cache = caches[i]
                val next = engine.prefill(text, Sampling(), engine.cache.reusable(text)).tokens.single()
                assertEquals(chosenAfter(text), next)
                val round = engine.verify(next, engine.draft(next, 3), Sampling())
                round.tokens.fold(text + next) { before, token -> before.also { assertEquals(chosenAfter(it), token) } + token }
            }
        }
        assertEquals(texts.map { it.size - 1 }, caches.map { it.position })
    }

    @Test
    fun graphsAreClosedWhereItsBuffersDoNotFit() = inTemporaryDirectory { directory ->
        assertFailsWith<IllegalStateException> { engine(directory, numTokens = Int.MAX_VALUE) }
        assertTrue(graphs.values.all { it.closed })
    }
}
