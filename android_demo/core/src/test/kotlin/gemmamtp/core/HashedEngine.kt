package gemmamtp.core

import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.LongBuffer
import java.util.Random
import java.util.zip.CRC32

internal const val WIDTH = 12
internal const val NUM_LOGITS = 64
internal const val SOFTCAP = 20.0
internal val PROMPT = listOf(3, 5, 8)
private const val STATES = 499

/** Tokens of a text; by a clock to which each pass takes the same time, so that plans are the same in each run. */
internal fun write(engine: Engine, options: Options, stats: Stats = Stats(), prompt: List<Int> = PROMPT): List<Int> {
    var now = 0.0
    val planner = DraftLength(8, Costs(8))
    return Rounds(engine, prompt, options, stats, planner, clock = { now++ }).asSequence().flatMap { it.tokens }.toList()
}

/**
 * A [GraphEngine] whose target is no graph: each row's state depends on the newest tokens, and its logits are those of a
 * head. It drafts the tokens of [answer], each wrong with probability 0.4.
 *
 * @param directory where its tables are written.
 */
internal class HashedEngine private constructor(
    private val target: HashedTarget,
    private val inner: GraphEngine,
    private val random: Random,
) : Engine by inner {
    var answer = emptyList<Int>()

    constructor(
        directory: File,
        vocabSize: Int,
        suppressed: Set<Int> = emptySet(),
        channels: Map<String, Pair<Int, Int>> = emptyMap(),
        random: Random = Random(0),
        target: HashedTarget = HashedTarget(vocabSize, random),
    ) : this(target, engine(directory, target, vocabSize, suppressed, channels), random)

    /** Rows of the head by token id, states, and for each state the logits of all tokens. */
    val head get() = target.head
    val states get() = target.states
    val logits get() = target.logits

    /** The largest logits of a state, and their ids. */
    fun largest(state: Int): Pair<FloatArray, IntArray> =
        FloatArray(NUM_LOGITS) { logits[state][target.ids[state][it]] } to target.ids[state]

    override fun draft(last: Int, numDraftTokens: Int): List<Int> {
        val at = cache.position + 1 - PROMPT.size
        return List(numDraftTokens) {
            if (random.nextDouble() < 0.4) random.nextInt(target.vocabSize) else answer.getOrElse(at + it) { 0 }
        }
    }
}

/** The target of a [HashedEngine]; embeddings begin with the token's id. */
internal class HashedTarget(val vocabSize: Int, random: Random) : BoundGraph {
    val head = Array(vocabSize) { FloatArray(WIDTH) { (2 * random.nextGaussian()).toFloat() } }
    val states = Array(STATES) { FloatArray(WIDTH) { random.nextGaussian().toFloat() } }
    var logits = emptyArray<FloatArray>()
    var ids = emptyArray<IntArray>()
    private val text = ArrayList<Int>()

    /** Compute all logits by an engine's own scores, so that those of rows and those of rules are the same. */
    fun prepare(engine: GraphEngine) {
        logits = Array(STATES) { state -> FloatArray(vocabSize) { engine.score(FloatBuffer.wrap(states[state]), it) } }
        ids = Array(STATES) { state ->
            (0 until vocabSize).sortedByDescending { logits[state][it] }.take(NUM_LOGITS).toIntArray()
        }
    }

    override fun bind(cache: Map<String, Tensor>) = Unit

    override fun run(inputs: Map<String, Tensor>): Map<String, Tensor> {
        val position = (inputs.getValue("position").data as LongBuffer).get(0).toInt()
        text.subList(position, text.size).clear()
        val embedded = inputs.getValue("embedded")
        for (i in 0 until embedded.shape[0].toInt()) text.add((embedded.data as FloatBuffer).get(i * WIDTH).toInt())
        val rows = inputs.getValue("output_rows").let { List(it.shape[0].toInt()) { i -> (it.data as LongBuffer).get(i).toInt() } }
        val (top, topIds, out) = Triple(floats(rows.size * NUM_LOGITS), longs(rows.size * NUM_LOGITS), floats(rows.size * WIDTH))
        for ((i, row) in rows.withIndex()) {
            val state = stateAfter(text.subList(0, position + row + 1))
            for ((rank, token) in ids[state].withIndex()) {
                top.put(i * NUM_LOGITS + rank, logits[state][token])
                topIds.put(i * NUM_LOGITS + rank, token.toLong())
            }
            for (column in 0 until WIDTH) out.put(i * WIDTH + column, states[state][column])
        }
        return mapOf(
            "top_logits" to Tensor(top, rows.size.toLong(), NUM_LOGITS.toLong()),
            "top_ids" to Tensor(topIds, rows.size.toLong(), NUM_LOGITS.toLong()),
            "state" to Tensor(out, rows.size.toLong(), WIDTH.toLong()),
        )
    }

    private fun stateAfter(text: List<Int>): Int {
        val newest = CRC32().apply { update("${text.size} ${text.takeLast(2)}".toByteArray()) }
        return (newest.value % STATES).toInt()
    }

    override fun close() = Unit
}

private fun engine(
    directory: File,
    target: HashedTarget,
    vocabSize: Int,
    suppressed: Set<Int>,
    channels: Map<String, Pair<Int, Int>>,
): GraphEngine {
    val embeddings = Array(vocabSize) { token -> FloatArray(WIDTH) { if (it == 0) token.toFloat() else 0f } }
    val manifest = smallManifest(
        vocabSize = vocabSize,
        maxSeqLen = 100_000,
        maxDraftTokens = 8,
        numTokens = 128,
        tables = mapOf(EMBEDDING to table(directory, EMBEDDING, embeddings), HEAD to table(directory, HEAD, target.head)),
        hiddenSize = WIDTH,
        softcap = SOFTCAP,
        suppressed = suppressed,
        channels = channels,
    )
    return loadEngine(directory, manifest, { _, _, _ -> mapOf("target" to target) }).also(target::prepare)
}

private fun table(directory: File, name: String, rows: Array<FloatArray>): TableMetadata {
    val numbers = ByteBuffer.allocate(4 * WIDTH * rows.size).order(ByteOrder.LITTLE_ENDIAN)
    for (row in rows) row.forEach(numbers::putFloat)
    File(directory, name).writeBytes(numbers.array())
    return TableMetadata(rows.size, WIDTH, 4 * WIDTH, "float32", WIDTH, Rows(listOf(Part(name, 0, rows.size))), null)
}
