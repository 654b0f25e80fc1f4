package gemmamtp.core

import java.io.Closeable
import java.io.File
import java.io.IOException
import java.nio.Buffer
import java.nio.FloatBuffer
import java.nio.LongBuffer
import kotlin.math.tanh

/** The cache grows by these: short texts stay small, and growing is too rare to matter. */
private const val CACHE_STEP_ROWS = 256

/** Loads the graphs of a bundle. */
fun interface LoadGraphs {
    /**
     * Graphs by the manifest's names.
     *
     * @param threads threads inside an operation; null lets the backend choose.
     * @throws InputError the backend is unknown, or its runtime cannot load the graphs.
     */
    fun load(bundle: File, manifest: Manifest, threads: Int?): Map<String, BoundGraph>
}

/** A loaded bundle: its graphs, the KV cache, and the state that drafting starts from. */
interface Engine {
    val manifest: Manifest

    /** How many rows of the KV cache are valid; the newest token of a text is not among them. */
    val position: Int

    /**
     * Run a prompt and choose the token after it: a round without drafts, of one token.
     *
     * @param tokens token ids of the whole prompt, at least one.
     * @param sampling chooses the token.
     * @param start how many of the tokens are in the cache already, fewer than all of them.
     */
    fun prefill(tokens: List<Int>, sampling: Chooser, start: Int = 0): Round

    /** Whether the cache still has every row that tokens from this position on attend to. */
    fun canResume(position: Int): Boolean

    /**
     * Draft tokens after the newest token.
     *
     * @param last id of the newest token, which is not in the cache yet.
     * @param numDraftTokens K; 0 gives an empty list.
     */
    fun draft(last: Int, numDraftTokens: Int): List<Int>

    /**
     * Run the newest token and the drafts after it, accept drafts, and roll the cache back.
     *
     * @param last id of the newest token, which is not in the cache yet.
     * @param drafts K draft tokens; none is plain decoding.
     * @param sampling chooses the tokens. It is asked row after row, up to the first token that is no draft.
     */
    fun verify(last: Int, drafts: List<Int>, sampling: Chooser): Round

    /**
     * Compute the logit of any token from a state and the target's head, in doubles, after the softcap.
     *
     * Where the graph rounds what it multiplies with the head, its own logits differ from these by that rounding.
     * Suppressed tokens of the bundle get their logits like any other.
     *
     * @param state the target's, as [Chooser.pick] gets it.
     */
    fun score(state: FloatBuffer, token: Int): Float
}

/** Outputs of a pass of the target: for each of R rows its largest logits in falling order, their ids, and its state. */
private class Outputs(val logits: List<FloatArray>, val ids: List<IntArray>, val states: FloatBuffer)

/**
 * Runs the graphs `target` and `drafter` of a bundle. The cache starts small and grows up to `max_seq_len` rows.
 *
 * Buffers of sliding layers stop growing at the size of their window; their rows move up in steps of [SLIDE_ROWS]. One
 * thread at a time may use an engine.
 *
 * @property windowStart the position that row 0 of sliding layers' buffers holds.
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
    private val cache = manifest.kv.associate { it.name to CacheBuffer(it) }

    // Inputs, which each pass overwrites: allocated once, for the largest pass.
    private val embedded = floats(manifest.limits.getValue("num_tokens") * hidden)
    private val perLayer = tables[PER_LAYER]?.let { floats(manifest.limits.getValue("num_tokens") * it.columns) }
    private val outputRows = longs(manifest.limits.getValue("num_outputs"))
    private val positionInput = longs(1)
    private val windowInput = longs(1)

    private val headRow by lazy { floats(hidden) } // only rules need it

    override fun prefill(tokens: List<Int>, sampling: Chooser, start: Int): Round {
        lateinit var outputs: Outputs
        for ((first, chunk) in chunks(tokens, manifest.limits.getValue("num_tokens"), start)) {
            position = first
            outputs = runTarget(chunk, listOf(chunk.lastIndex))
        }
        position = tokens.size
        return finish(emptyList(), outputs, sampling)
    }

    override fun canResume(position: Int) = windowStart <= windowStartAt(position)

    override fun verify(last: Int, drafts: List<Int>, sampling: Chooser): Round {
        val outputs = runTarget(listOf(last) + drafts, (0..drafts.size).toList())
        position += 1
        return finish(drafts, outputs, sampling)
    }

    override fun draft(last: Int, numDraftTokens: Int): List<Int> {
        val drafts = ArrayList<Int>(numDraftTokens)
        var token = last
        var from = state
        repeat(numDraftTokens) {
            // The position stays that of the newest token in every step, as it was in training.
            tables.getValue(EMBEDDING).read(token, embedded)
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
                // Copied: the next run may overwrite the memory of this output.
                from = nextState.also { copy(outputs.getValue("next_state").data as FloatBuffer, 0, it) }
            }
        }
        return drafts
    }

    /** Choose tokens from a pass's outputs, the first for the token at [position]; accept drafts and roll back. */
    private fun finish(drafts: List<Int>, outputs: Outputs, sampling: Chooser): Round {
        val logprobs = ArrayList<Double>()
        val choices = sequence {
            for (row in outputs.logits.indices) {
                val rowState = outputs.states.part(row * hidden, hidden)
                val choice = try {
                    sampling.pick(outputs.logits[row], outputs.ids[row], rowState, position + row)
                } catch (error: InputError) { // rules leave no token here: what was chosen is given out first
                    if (row == 0) throw error
                    return@sequence
                }
                logprobs.add(choice.logprob)
                yield(choice.token)
            }
        }
        val tokens = accept(drafts, choices)
        // Rollback is by position alone: rejected rows are masked, and overwritten by the next pass.
        val accepted = tokens.lastIndex
        position += accepted
        copy(outputs.states, accepted * hidden, state)
        return Round(drafts, accepted, tokens, logprobs)
    }

    override fun score(state: FloatBuffer, token: Int): Float {
        (tables[HEAD] ?: tables.getValue(EMBEDDING)).read(token, headRow)
        var product = 0.0
        for (i in 0 until hidden) product += headRow.get(i).toDouble() * state.get(i)
        val softcap = manifest.finalLogitSoftcapping
        return (if (softcap == 0.0) product else softcap * tanh(product / softcap)).toFloat()
    }

    /** Run the target on T tokens, whose keys and values it writes from [position] on, and output R rows of them. */
    private fun runTarget(tokens: List<Int>, rows: List<Int>): Outputs {
        val end = position + tokens.size
        check(end <= manifest.maxSeqLen) { "$end cache rows asked for, the bundle has ${manifest.maxSeqLen}" }
        // Padding is computed and dropped; the cache row that it writes is masked like a rejected one.
        val ids = padded(tokens, manifest.rowMultiple)
        val paddedRows = padded(rows, manifest.rowMultiple)
        makeRoom(ids.size)
        tables.getValue(EMBEDDING).read(ids, embedded)
        paddedRows.forEachIndexed { i, row -> outputRows.put(i, row.toLong()) }
        val count = ids.size.toLong()
        val outputs = graphs.getValue("target").run(
            perLayerInput(ids) + mapOf(
                "embedded" to Tensor(embedded.first(ids.size * hidden), count, hidden.toLong()),
                "position" to Tensor(positionInput.put(0, position.toLong()), 1),
                "window_start" to Tensor(windowInput.put(0, windowStart.toLong()), 1),
                "output_rows" to Tensor(outputRows.first(paddedRows.size), paddedRows.size.toLong()),
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

    /** The rows of the per-layer embeddings as an input; none where the model has none. */
    private fun perLayerInput(ids: List<Int>): Map<String, Tensor> {
        val table = tables[PER_LAYER] ?: return emptyMap()
        val rows = perLayer!!.also { table.read(ids, it) }.first(ids.size * table.columns)
        return mapOf("per_layer" to Tensor(rows, ids.size.toLong(), table.columns.toLong()))
    }

    /** The last position at which sliding layers' buffers may begin for tokens from a position on. */
    private fun windowStartAt(position: Int) =
        (maxOf(0L, position - manifest.slidingWindow.toLong() - 2) / SLIDE_ROWS * SLIDE_ROWS).toInt()

    /** Make room for [count] rows after [position]: move sliding layers' rows up, then grow the buffers. */
    private fun makeRoom(count: Int) {
        val windowRows = manifest.limits.getValue("window_rows")
        if (position == 0) windowStart = 0
        if (position + count - windowStart > windowRows) {
            val start = windowStartAt(position)
            for (kv in manifest.kv.filter { it.sliding }) cache.getValue(kv.name).moveUp(start - windowStart)
            windowStart = start
        }
        val used = { kv: KVBuffer -> position + count - if (kv.sliding) windowStart else 0 }
        val short = manifest.kv.filter { used(it) > cache.getValue(it.name).rows }
        if (short.isEmpty()) return
        // Graphs release the old buffers first, so that only one buffer at a time exists twice.
        graphs.values.forEach { it.bind(emptyMap()) }
        for (kv in short) {
            val limit = if (kv.sliding) windowRows else manifest.limits.getValue("cache_rows")
            cache.getValue(kv.name).grow(minOf(roundUp(used(kv), CACHE_STEP_ROWS), limit))
        }
        val tensors = cache.mapValues { it.value.tensor }
        graphs.values.forEach { it.bind(tensors) }
    }

    override fun close() = graphs.values.forEach { it.close() }
}

/**
 * Load a bundle whose files are trusted already.
 *
 * @param threads threads inside an operation; null lets the backend choose.
 * @throws InputError [threads] is below 1, the backend is unknown, its runtime cannot load the graphs, or the tables do
 *     not fit the manifest.
 */
fun loadEngine(bundle: File, manifest: Manifest, loadGraphs: LoadGraphs, threads: Int? = null): GraphEngine {
    if (threads != null && threads < 1) throw InputError("threads is $threads, expected at least 1")
    val tables = try {
        manifest.tables.mapValues { (_, metadata) -> Table(bundle, metadata) }
    } catch (error: IllegalArgumentException) {
        throw InputError("$bundle: tables are malformed (${oneLine(error)}); export the bundle again", error)
    } catch (error: IOException) {
        throw InputError("$bundle: tables cannot be mapped (${oneLine(error)}); copy the bundle again", error)
    }
    val graphs = loadGraphs.load(bundle, manifest, threads)
    try {
        return GraphEngine(manifest, graphs, tables)
    } catch (error: Throwable) { // memory may run out for its buffers, and nothing else closes the graphs
        graphs.values.forEach { it.close() }
        throw error
    }
}

/** The tokens from index [start] on in chunks of at most [size], each with the index of its first token. */
fun chunks(tokens: List<Int>, size: Int, start: Int = 0): Sequence<Pair<Int, List<Int>>> =
    (start until tokens.size step size).asSequence().map { it to tokens.subList(it, minOf(tokens.size, it + size)) }

/** The list with its last item repeated up to a multiple. */
private fun padded(items: List<Int>, multiple: Int) =
    items + List(roundUp(items.size, multiple) - items.size) { items.last() }

private fun copy(from: FloatBuffer, start: Int, into: FloatBuffer) {
    into.duplicate().put(from.part(start, into.capacity()))
}

private fun FloatBuffer.first(count: Int) = part(0, count)

private fun LongBuffer.first(count: Int): LongBuffer = duplicate().also { it.only(0, count) }.slice()

/** The same memory, as a buffer of its own. */
private fun FloatBuffer.part(start: Int, count: Int): FloatBuffer = duplicate().also { it.only(start, count) }.slice()

/** An extension of [Buffer], whose methods every Android has: FloatBuffer's own came with Java 9. */
private fun Buffer.only(start: Int, count: Int) {
    position(start)
    limit(start + count)
}
