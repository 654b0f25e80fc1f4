package gemmamtp.core

import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.LongBuffer
import java.nio.ShortBuffer
import java.util.concurrent.atomic.AtomicInteger
import kotlin.test.assertEquals
import kotlin.test.assertFalse
import kotlin.test.assertTrue

internal const val FAKE_WINDOW = 40
internal const val FAKE_VOCAB = 50

/** The token that the fake target chooses after a text: from sums over what its full and sliding layer attend to. */
internal fun chosenAfter(text: List<Int>): Int {
    val window = text.takeLast(FAKE_WINDOW)
    val sum = text.sum() + window.withIndex().sumOf { (i, token) -> token * (text.size - window.size + i) % 7 }
    return if (sum % 3 == 0) sum % FAKE_VOCAB else (text.last() + 1) % FAKE_VOCAB
}

/**
 * A target with two buffers of two heads whose rows hold the token id, or a drafter that drafts the next id or the one after
 * it, as the state says.
 *
 * @param running how many passes run now: there is one at a time.
 */
internal class FakeGraph(
    private val isTarget: Boolean,
    private val rowsFirst: Boolean,
    private val running: AtomicInteger = AtomicInteger(),
) : BoundGraph {
    private var cache = emptyMap<String, Tensor>()
    @Volatile var closed = false
    @Volatile var inPass = {}
    private val states = floats(16) // the next pass overwrites them
    var passes = 0
    var left = 0 // of the passes up to the one that spoils its rows and fails

    override fun bind(cache: Map<String, Tensor>) {
        assertFalse(closed)
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
        assertEquals(1, running.incrementAndGet())
        try {
            inPass()
            return outputs(inputs)
        } finally {
            assertFalse(closed)
            running.decrementAndGet()
        }
    }

    private fun outputs(inputs: Map<String, Tensor>): Map<String, Tensor> {
        val tokens = inputs.getValue("embedded").let { at -> List(at.shape[0].toInt()) { (at.data as FloatBuffer).get(it).toInt() } }
        val (position, windowStart) = listOf("position", "window_start").map { (inputs.getValue(it).data as LongBuffer).get(0).toInt() }
        if (!isTarget) {
            val state = (inputs.getValue("state").data as FloatBuffer).get(0).toLong()
            val next = (tokens[0] + 1 + (state + 1) % 4 / 3) % FAKE_VOCAB
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
                if (at >= end - FAKE_WINDOW) {
                    assertEquals(full, get("key_sliding", head, at - windowStart), "position $at")
                }
                full
            }
            logits.put(2 * i, 1f)
            ids.put(2 * i, chosenAfter(seen).toLong())
            states.put(i, seen.sum().toFloat())
        }
        return mapOf(
            "top_logits" to Tensor(logits, rows.size.toLong(), 2),
            "top_ids" to Tensor(ids, rows.size.toLong(), 2),
            "state" to Tensor(states, rows.size.toLong(), 1),
        )
    }

    override fun close() {
        assertFalse(closed)
        closed = true
    }
}

/**
 * An engine on fake graphs with caches of two sliding windows' rows and more.
 *
 * @param directory where its table is written.
 */
internal class FakeBundle(
    directory: File,
    numTokens: Int = 16,
    type: KVType = KVType.FLOAT32,
    layout: List<String> = HEADS_FIRST,
    digest: String = "",
    fullType: KVType = type,
    maxSeqLen: Int = 900,
    private val allocate: (Long) -> ByteBuffer = ::direct,
) {
    val running = AtomicInteger()
    val target = FakeGraph(true, layout[0] == "rows", running)
    val drafter = FakeGraph(false, layout[0] == "rows", running)
    val manifest: Manifest
    val engine: GraphEngine

    init {
        val numbers = ByteBuffer.allocate(4 * FAKE_VOCAB).order(ByteOrder.LITTLE_ENDIAN)
        for (token in 0 until FAKE_VOCAB) numbers.putFloat(token.toFloat())
        // A file that is mapped must not be written again.
        File(directory, "rows").apply { if (!exists()) writeBytes(numbers.array()) }
        val metadata = TableMetadata(FAKE_VOCAB, 1, 4, "float32", 1, Rows(listOf(Part("rows", 0, FAKE_VOCAB))), null)
        manifest = smallManifest(
            vocabSize = FAKE_VOCAB,
            maxSeqLen = maxSeqLen,
            maxDraftTokens = 5,
            slidingWindow = FAKE_WINDOW,
            numTokens = numTokens,
            rowMultiple = 2,
            kv = listOf(
                KVBuffer("key_full", false, 2, 1, fullType, layout),
                KVBuffer("key_sliding", true, 2, 1, type, layout),
            ),
            tables = listOf(EMBEDDING, PER_LAYER).associateWith { metadata },
            digest = digest,
        )
        engine = loadEngine(directory, manifest, { _, _, _ -> mapOf("target" to target, "drafter" to drafter) }, 1, allocate)
    }

    /** A decoder whose passes all take the same time, so that plans are the same in each run. */
    fun decoder(planner: DraftLength = DraftLength(5, Costs(5, 2)), save: () -> Unit = {}): Decoder {
        var now = 0.0
        return Decoder(engine, null, null, planner, { now++ }, save, allocate)
    }
}
