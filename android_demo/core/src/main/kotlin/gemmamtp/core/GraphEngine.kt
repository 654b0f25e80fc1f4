package gemmamtp.core

import java.io.Closeable
import java.io.File
import java.io.IOException
import java.nio.Buffer
import java.nio.ByteBuffer
import java.nio.FloatBuffer
import java.nio.LongBuffer
import kotlin.math.tanh

/** Loads the graphs of a bundle: a runtime. */
public fun interface LoadGraphs {
    /**
     * Graphs by the manifest's names.
     *
     * @param threads threads inside an operation.
     * @throws InputError the bundle is for another backend, or the runtime cannot load its graphs.
     */
    public fun load(bundle: File, manifest: Manifest, threads: Int): Map<String, BoundGraph>
}

/** A loaded bundle: its graphs, and the cache of the conversation that they run. */
internal interface Engine {
    val manifest: Manifest

    /** The KV cache. The newest token of a text is not in it yet. Another may take its place between two passes. */
    var cache: Cache

    /**
     * Run a prompt in chunks and choose the token after it: a round without drafts, of one token, or of none if [goOn]
     * returned false.
     *
     * Whatever ends it early, the cache has the tokens of the last chunk that was run to its end.
     *
     * @param tokens token ids of the whole prompt, at least one.
     * @param sampling chooses the token.
     * @param start how many of the tokens are in the cache already, fewer than all of them.
     * @param goOn called before the first chunk and after each with how many of the tokens are in the cache; returns whether
     *     to go on. Except after the last chunk, it may run other passes on other caches, if it puts this one back.
     */
    fun prefill(tokens: List<Int>, sampling: Chooser, start: Int = 0, goOn: (Int) -> Boolean = { true }): Round

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

/** What a prefill gives that was stopped. */
private val STOPPED = Round(emptyList(), 0, emptyList(), emptyList())

/** Runs the graphs `target` and `drafter` of a bundle over one cache at a time. One thread at a time may use an engine. */
internal class GraphEngine(
    override val manifest: Manifest,
    private val graphs: Map<String, BoundGraph>,
    private val tables: Map<String, Table>,
    allocate: (Long) -> ByteBuffer = ::direct,
) : Engine, Closeable {
    override var cache = Cache(manifest, allocate)
    private var bound: Map<String, Tensor>? = null // the buffers that the graphs use
    private val position get() = cache.position
    private val hidden = manifest.hiddenSize
    private val nextState = floats(hidden)

    // Inputs, which each pass overwrites: allocated once, for the largest pass.
    private val embedded = floats(manifest.limits.getValue("num_tokens") * hidden)
    private val perLayer = tables[PER_LAYER]?.let { floats(manifest.limits.getValue("num_tokens") * it.columns) }
    private val outputRows = longs(manifest.limits.getValue("num_outputs"))
    private val positionInput = longs(1)
    private val windowInput = longs(1)

    private val headRow by lazy { floats(hidden) } // only rules need it

    override fun prefill(tokens: List<Int>, sampling: Chooser, start: Int, goOn: (Int) -> Boolean): Round {
        lateinit var outputs: Outputs
        for ((first, chunk) in chunks(tokens, manifest.limits.getValue("num_tokens"), start)) {
            if (!goOn(first)) return STOPPED
            cache.rollBack(first)
            outputs = runTarget(chunk, listOf(chunk.lastIndex))
            cache.append(chunk)
        }
        return if (goOn(tokens.size)) finish(emptyList(), outputs, sampling) else STOPPED
    }

    override fun verify(last: Int, drafts: List<Int>, sampling: Chooser): Round {
        val outputs = runTarget(listOf(last) + drafts, (0..drafts.size).toList())
        cache.append(listOf(last))
        return finish(drafts, outputs, sampling)
    }

    override fun draft(last: Int, numDraftTokens: Int): List<Int> {
        val drafts = ArrayList<Int>(numDraftTokens)
        var token = last
        var from = cache.state
        bind()
        repeat(numDraftTokens) {
            // The position stays that of the newest token in every step, as it was in training.
            tables.getValue(EMBEDDING).read(token, embedded)
            val outputs = graphs.getValue("drafter").run(
                mapOf(
                    "embedded" to Tensor(embedded.first(hidden), 1, hidden.toLong()),
                    "state" to Tensor(from, 1, hidden.toLong()),
                    "position" to Tensor(positionInput.put(0, position.toLong()), 1),
                    "window_start" to Tensor(windowInput.put(0, cache.windowStart.toLong()), 1),
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
        // Rejected rows need no clearing: they are masked, and overwritten by the next pass.
        val accepted = tokens.lastIndex
        cache.append(drafts.take(accepted))
        copy(outputs.states, accepted * hidden, cache.state)
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
        cache.makeRoom(ids.size)
        bind()
        tables.getValue(EMBEDDING).read(ids, embedded)
        paddedRows.forEachIndexed { i, row -> outputRows.put(i, row.toLong()) }
        val count = ids.size.toLong()
        val outputs = graphs.getValue("target").run(
            perLayerInput(ids) + mapOf(
                "embedded" to Tensor(embedded.first(ids.size * hidden), count, hidden.toLong()),
                "position" to Tensor(positionInput.put(0, position.toLong()), 1),
                "window_start" to Tensor(windowInput.put(0, cache.windowStart.toLong()), 1),
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

    /** Let the graphs use the cache's buffers, if they do not yet: it has grown, or it is another cache. */
    private fun bind() {
        val buffers = cache.tensors
        if (bound === buffers) return
        bound = null // until all of them are bound
        graphs.values.forEach { it.bind(buffers) }
        bound = buffers
    }

    override fun close() = graphs.values.forEach { it.close() }
}

/**
 * Load a bundle whose files are trusted already.
 *
 * @param threads threads inside an operation.
 * @param allocate see [Cache].
 * @throws InputError [threads] is below 1, the bundle is for another backend, the runtime cannot load the graphs, or the tables do
 *     not fit the manifest.
 */
internal fun loadEngine(
    bundle: File,
    manifest: Manifest,
    loadGraphs: LoadGraphs,
    threads: Int = 1,
    allocate: (Long) -> ByteBuffer = ::direct,
): GraphEngine {
    if (threads < 1) throw InputError("threads is $threads, expected at least 1")
    val tables = try {
        manifest.tables.mapValues { (_, metadata) -> Table(bundle, metadata) }
    } catch (error: IllegalArgumentException) {
        throw InputError("$bundle: tables are malformed (${oneLine(error)}); export the bundle again", error)
    } catch (error: IOException) {
        throw InputError("$bundle: tables cannot be mapped (${oneLine(error)}); copy the bundle again", error)
    }
    val graphs = loadGraphs.load(bundle, manifest, threads)
    try {
        return GraphEngine(manifest, graphs, tables, allocate)
    } catch (error: Throwable) { // memory may run out for its buffers, and nothing else closes the graphs
        graphs.values.forEach { it.close() }
        throw error
    }
}

/** The tokens from index [start] on in chunks of at most [size], each with the index of its first token. */
internal fun chunks(tokens: List<Int>, size: Int, start: Int = 0): Sequence<Pair<Int, List<Int>>> =
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
