package gemmamtp.core

import java.io.Closeable
import java.io.File
import java.io.IOException
import java.nio.Buffer
import java.nio.FloatBuffer
import java.nio.LongBuffer

/** Rows the cache grows by: short texts stay small, and growing is too rare to matter. */
private const val CACHE_STEP = 256

/** Loads the graphs of a bundle, by name; `threads` null lets the backend choose. */
fun interface LoadGraphs {
    fun load(bundle: File, manifest: Manifest, threads: Int?): Map<String, BoundGraph>
}

/** What the decoding loop asks of a loaded bundle: its KV cache, and the state that drafting starts from. */
interface Engine {
    val manifest: Manifest

    /** Rows that are valid in the cache. */
    val position: Int

    /** Start a text whose tokens before [start] are in the cache already; the round has the choice after it. */
    fun prefill(tokens: List<Int>, sampling: Sampling, start: Int = 0): Round

    /** Whether the cache still has all that tokens from this position on may see. */
    fun keeps(position: Int): Boolean

    /** Draft tokens after [last], the newest token, which is not in the cache yet. */
    fun draft(last: Int, numDraftTokens: Int): List<Int>

    /** Run [last] and any drafts after it, accept, roll back. With no drafts this is plain decoding. */
    fun verify(last: Int, drafts: List<Int>, sampling: Sampling): Round
}

/** What one pass of the target gives for each row that was asked for: logits in falling order, their ids, the state. */
private class Outputs(val logits: List<FloatArray>, val ids: List<IntArray>, val states: FloatBuffer)

/**
 * Runs the graphs `target` and `drafter` of a bundle; the cache starts small and grows up to `max_seq_len`.
 *
 * Sliding layers' buffers stop growing where their window ends: row 0 of them holds position [windowStart]. One thread
 * at a time may use an engine.
 */
class GraphEngine(
    override val manifest: Manifest,
    private val graphs: Map<String, BoundGraph>,
    private val tables: Map<String, Table>,
) : Engine, Closeable {
    override var position = 0
        private set
    var windowStart = 0
        private set
    private val hidden = manifest.hiddenSize
    private val state = floats(hidden)
    private val nextState = floats(hidden)
    private val cache = manifest.kv.associateTo(HashMap()) {
        it.name to Tensor(floats(0), it.numKeyValueHeads.toLong(), 0, it.headDim.toLong())
    }

    // Inputs that are filled anew for each pass: allocated once, for the largest.
    private val embedded = floats(manifest.limits.getValue("num_tokens") * hidden)
    private val perLayerColumns = tables.getValue(TABLES[1]).columns
    private val perLayer = floats(manifest.limits.getValue("num_tokens") * perLayerColumns)
    private val outputRows = longs(manifest.limits.getValue("num_outputs"))
    private val positionInput = longs(1)
    private val windowInput = longs(1)

    override fun prefill(tokens: List<Int>, sampling: Sampling, start: Int): Round {
        lateinit var outputs: Outputs
        for (from in start until tokens.size step manifest.limits.getValue("num_tokens")) {
            position = from
            val chunk = tokens.subList(from, minOf(tokens.size, from + manifest.limits.getValue("num_tokens")))
            outputs = runTarget(chunk, listOf(chunk.lastIndex))
        }
        position = tokens.size
        return chosen(emptyList(), outputs, sampling)
    }

    override fun keeps(position: Int) = windowStart <= windowStartAt(position)

    override fun verify(last: Int, drafts: List<Int>, sampling: Sampling): Round {
        val outputs = runTarget(listOf(last) + drafts, (0..drafts.size).toList())
        position += 1
        return chosen(drafts, outputs, sampling)
    }

    override fun draft(last: Int, numDraftTokens: Int): List<Int> {
        val drafts = ArrayList<Int>(numDraftTokens)
        var token = last
        var from = state
        repeat(numDraftTokens) {
            // The position stays that of `last`, as it was in training.
            tables.getValue(TABLES[0]).read(listOf(token), embedded)
            val outputs = graphs.getValue("drafter").run(
                mapOf(
                    "embedded" to Tensor(embedded.first(hidden), 1, hidden.toLong()),
                    "state" to Tensor(from, 1, hidden.toLong()),
                    "position" to Tensor(positionInput.put(0, position.toLong()), 1),
                    "window_start" to Tensor(windowInput.put(0, windowStart.toLong()), 1),
                ),
            )
            token = (outputs.getValue("draft_token").data as LongBuffer).get(0).toInt()
            drafts.add(token)
            if (drafts.size < numDraftTokens) {
                // Copied, because the next run may overwrite what it reads.
                from = nextState.also { copy(outputs.getValue("next_state").data as FloatBuffer, 0, it) }
            }
        }
        return drafts
    }

    /** The round that these outputs make, the first of them for the token at [position]. */
    private fun chosen(drafts: List<Int>, outputs: Outputs, sampling: Sampling): Round {
        val ranks = outputs.logits.mapIndexed { i, logits -> choose(logits, position + i, sampling) }
        val choices = ranks.mapIndexed { i, rank -> outputs.ids[i][rank] }
        val accepted = accept(drafts, choices)
        // Rollback is by position alone: rejected rows are masked, and overwritten by the next pass.
        position += accepted
        copy(outputs.states, accepted * hidden, state)
        val logprobs = (0..accepted).map { logProbability(outputs.logits[it], ranks[it]) }
        return Round(drafts, accepted, choices.take(accepted + 1), logprobs)
    }

    /** Write the tokens' K/V from [position] on. */
    private fun runTarget(tokens: List<Int>, rows: List<Int>): Outputs {
        val end = position + tokens.size
        check(end <= manifest.maxSeqLen) { "$end cache rows asked for, the bundle has ${manifest.maxSeqLen}" }
        // What fills up to the multiple is computed and dropped; the row it writes is masked like a rejected one.
        val ids = filled(tokens, manifest.rowMultiple)
        val wanted = filled(rows, manifest.rowMultiple)
        makeRoom(ids.size)
        tables.getValue(TABLES[0]).read(ids, embedded)
        tables.getValue(TABLES[1]).read(ids, perLayer)
        wanted.forEachIndexed { i, row -> outputRows.put(i, row.toLong()) }
        val count = ids.size.toLong()
        val outputs = graphs.getValue("target").run(
            mapOf(
                "embedded" to Tensor(embedded.first(ids.size * hidden), count, hidden.toLong()),
                "per_layer" to Tensor(perLayer.first(ids.size * perLayerColumns), count, perLayerColumns.toLong()),
                "position" to Tensor(positionInput.put(0, position.toLong()), 1),
                "window_start" to Tensor(windowInput.put(0, windowStart.toLong()), 1),
                "output_rows" to Tensor(outputRows.first(wanted.size), wanted.size.toLong()),
            ),
        )
        val logits = outputs.getValue("top_logits")
        val topIds = outputs.getValue("top_ids").data as LongBuffer
        val k = logits.shape[1].toInt()
        return Outputs(
            rows.indices.map { row -> FloatArray(k) { (logits.data as FloatBuffer).get(row * k + it) } },
            rows.indices.map { row -> IntArray(k) { topIds.get(row * k + it).toInt() } },
            outputs.getValue("state").data as FloatBuffer,
        )
    }

    /** Where sliding layers' buffers may begin at most, so that tokens from a position on see all they may see. */
    private fun windowStartAt(position: Int) = maxOf(0, position - manifest.slidingWindow - 2) / SLIDE * SLIDE

    /** Let the buffers hold so many rows after [position]: they grow, then those of sliding layers move up. */
    private fun makeRoom(count: Int) {
        val windowRows = manifest.limits.getValue("window_rows")
        if (position == 0) windowStart = 0
        if (position + count - windowStart > windowRows) {
            val start = windowStartAt(position)
            for (kv in manifest.kv.filter { it.sliding }) moveUp(cache.getValue(kv.name), start - windowStart)
            windowStart = start
        }
        val used = { kv: KVBuffer -> position + count - if (kv.sliding) windowStart else 0 }
        val short = manifest.kv.filter { used(it) > cache.getValue(it.name).shape[1] }
        if (short.isEmpty()) return
        // Nobody else holds an old buffer while a new one is made, so only one of them exists twice.
        graphs.values.forEach { it.bind(emptyMap()) }
        for (kv in short) {
            val limit = if (kv.sliding) windowRows else manifest.limits.getValue("cache_rows")
            val rows = minOf((used(kv) + CACHE_STEP - 1) / CACHE_STEP * CACHE_STEP, limit)
            cache[kv.name] = grow(cache.getValue(kv.name), rows)
        }
        graphs.values.forEach { it.bind(cache) }
    }

    override fun close() = graphs.values.forEach { it.close() }
}

/** Open a bundle whose files are trusted already; throws InputError. */
fun loadEngine(bundle: File, manifest: Manifest, loadGraphs: LoadGraphs, threads: Int? = null): GraphEngine {
    if (threads != null && threads < 1) throw InputError("threads is $threads, expected at least 1")
    val tables = try {
        manifest.tables.mapValues { (_, facts) -> Table(bundle, facts) }
    } catch (error: IllegalArgumentException) {
        throw InputError("$bundle: tables are malformed (${oneLine(error)}); export the bundle again", error)
    } catch (error: IOException) {
        throw InputError("$bundle: tables cannot be mapped (${oneLine(error)}); copy the bundle again", error)
    }
    val graphs = loadGraphs.load(bundle, manifest, threads)
    try {
        return GraphEngine(manifest, graphs, tables)
    } catch (error: Throwable) { // memory may run out for its buffers, and nobody else knows the graphs
        graphs.values.forEach { it.close() }
        throw error
    }
}

/** The list with its last item repeated up to a multiple. */
private fun filled(items: List<Int>, multiple: Int) =
    items + List((multiple - items.size % multiple) % multiple) { items.last() }

/** Shift the rows of a cache buffer `[heads, rows, dim]` towards row 0. */
private fun moveUp(tensor: Tensor, by: Int) {
    val (heads, rows, dim) = tensor.shape.map { it.toInt() }
    val data = tensor.data as FloatBuffer
    for (head in 0 until heads) {
        val from = data.part((head * rows + by) * dim, (rows - by) * dim)
        data.part(head * rows * dim, (rows - by) * dim).put(from) // as memmove: buffers may overlap
    }
}

/** A larger cache buffer `[heads, rows, dim]` with the same rows, then zeros. */
private fun grow(old: Tensor, rows: Int): Tensor {
    val (heads, before, dim) = old.shape.map { it.toInt() }
    val data = floats(heads * rows * dim)
    for (head in 0 until heads) {
        data.part(head * rows * dim, before * dim).put((old.data as FloatBuffer).part(head * before * dim, before * dim))
    }
    return Tensor(data, heads.toLong(), rows.toLong(), dim.toLong())
}

private fun copy(from: FloatBuffer, start: Int, into: FloatBuffer) {
    into.duplicate().put(from.part(start, into.capacity()))
}

private fun FloatBuffer.first(count: Int) = part(0, count)

private fun LongBuffer.first(count: Int): LongBuffer = duplicate().also { it.only(0, count) }.slice()

/** The same memory, as a buffer of its own. */
private fun FloatBuffer.part(start: Int, count: Int): FloatBuffer = duplicate().also { it.only(start, count) }.slice()

/** On [Buffer], whose methods every Android has: those of FloatBuffer itself came with Java 9. */
private fun Buffer.only(start: Int, count: Int) {
    position(start)
    limit(start + count)
}
