package gemmamtp.core

/** What is to be written. [numDraftTokens] 0 is plain decoding, null lets a [DraftLength] plan each round. */
data class Options(
    val maxNewTokens: Int = 128,
    val numDraftTokens: Int? = 0,
    val sampling: Sampling = Sampling(),
)

/** Seconds from some moment on. */
fun interface Clock {
    fun seconds(): Double
}

val SYSTEM_CLOCK = Clock { System.nanoTime() / 1e9 }

/**
 * The decoding loop: the prefill, then rounds, as they are decided.
 *
 * Speculative and plain decoding give the same tokens; they stop at the first end token, after `maxNewTokens`, or when
 * prompt and answer together fill the context. `stats.finishReason` is set before the last round is given.
 *
 * @param length plans the rounds, kept by the caller from text to text.
 * @param start how many tokens of the prompt are in the engine's cache already.
 * @throws InputError the prompt or the options are impossible for this bundle.
 */
class Rounds(
    private val engine: Engine,
    private val prompt: List<Int>,
    private val options: Options,
    private val stats: Stats,
    length: DraftLength,
    private val start: Int = 0,
    private val clock: Clock = SYSTEM_CLOCK,
) : Iterator<Round> {
    private val room = engine.manifest.maxSeqLen - prompt.size
    private val outOfBudget = if (options.maxNewTokens <= room) "length" else "max_seq_len"
    private val drafts = options.numDraftTokens?.let { FixedDrafts(engine, it) } ?: PlannedDrafts(engine, length, prompt)
    private var left = minOf(options.maxNewTokens, room)
    private var last: Int? = null // none before the prefill

    init {
        checkPrompt(engine.manifest, prompt)
        checkOptions(engine.manifest, options)
        stats.reusedTokens = start
        stats.finishReason = ""
    }

    override fun hasNext() = stats.finishReason.isEmpty()

    override fun next(): Round {
        if (!hasNext()) throw NoSuchElementException()
        val before = last
        val done = if (before == null) prefill() else round(before)
        val end = done.tokens.indexOfFirst { it in engine.manifest.eos }
        val kept = done.cut(if (end < 0) done.tokens.size else end + 1)
        left -= kept.tokens.size
        if (before != null) stats.add(kept, drafts.source)
        if (end >= 0 || left == 0) stats.finishReason = if (end >= 0) "eos" else outOfBudget
        last = kept.tokens.last()
        return kept
    }

    private fun prefill(): Round {
        val started = clock.seconds()
        val done = engine.prefill(prompt, options.sampling, start)
        stats.prefillSeconds = clock.seconds() - started
        return done
    }

    private fun round(last: Int): Round {
        val started = clock.seconds()
        // The bonus token needs a place in the budget as well.
        val proposed = drafts.make(last, minOf(engine.manifest.maxDraftTokens, left - 1))
        val drafted = clock.seconds()
        val done = engine.verify(last, proposed, options.sampling)
        val ended = clock.seconds()
        drafts.learn(done, drafted - started, ended - drafted)
        stats.decodeSeconds += ended - started
        return done
    }
}

/** Refuse what a bundle cannot do. */
fun checkOptions(manifest: Manifest, options: Options) {
    val most = manifest.maxDraftTokens
    if (options.numDraftTokens != null && options.numDraftTokens !in 0..most) {
        throw InputError(
            "${options.numDraftTokens} draft tokens a round were asked for, the bundle was exported for up to $most",
        )
    }
    if (options.maxNewTokens < 1) {
        throw InputError("${options.maxNewTokens} new tokens were asked for, expected at least 1")
    }
}

/** Refuse a prompt that cannot be run: empty, too long for the context, or with an id that is not in the vocabulary. */
fun checkPrompt(manifest: Manifest, prompt: List<Int>) {
    if (prompt.isEmpty()) throw InputError("the prompt is empty: expected at least one token")
    if (prompt.size >= manifest.maxSeqLen) {
        throw InputError(
            "the prompt has ${prompt.size} tokens, the bundle's context has ${manifest.maxSeqLen} for prompt and answer" +
                " together; shorten it, or export with a larger --max-seq-len",
        )
    }
    prompt.firstOrNull { it !in 0 until manifest.vocabSize }?.let {
        throw InputError("the prompt has token id $it, expected 0 to ${manifest.vocabSize - 1}")
    }
}
