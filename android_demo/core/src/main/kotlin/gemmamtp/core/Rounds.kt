package gemmamtp.core

/**
 * How one text is generated. [Decoder.options] has the checkpoint's sampling; this is greedy if nothing is said.
 *
 * @property maxNewTokens the largest number of tokens to generate, at least 1.
 * @property numDraftTokens K of every round; 0 is plain decoding, null lets a [DraftLength] plan each round.
 * @property sampling how tokens are chosen.
 * @property rules what changes logits before that.
 * @property thinkingBudget the largest number of tokens of thoughts, after which a thought is ended; null for any.
 * @property whenFull what happens where prompt and answer fill the context.
 */
public data class Options @JvmOverloads constructor(
    val maxNewTokens: Int = 128,
    val numDraftTokens: Int? = null,
    val sampling: Sampling = Sampling(),
    val rules: Rules = Rules(),
    val thinkingBudget: Int? = null,
    val whenFull: WhenFull = WhenFull.STOP,
)

/** A clock that never goes back. */
internal fun interface Clock {
    /** Seconds since any fixed moment. */
    fun seconds(): Double
}

/** The JVM's clock. */
internal val SYSTEM_CLOCK = Clock { System.nanoTime() / 1e9 }

/**
 * The decoding loop: the prefill, then rounds, as they are decided.
 *
 * Speculative and plain decoding give the same tokens. They stop at the first end token, after `maxNewTokens`, or when
 * prompt and answer together fill the context, unless [shift] says what stays. That is run before the round that filled it is
 * returned: a text that is stopped meanwhile ends with that round. `stats.finishReason` is set before the last round is
 * returned. A prompt's prefill that is stopped gives a round without tokens, the only one.
 *
 * @param prompt token ids, the first of them the beginning-of-text token.
 * @param stats counts of this text, which are added to.
 * @param planner plans the rounds if the options do not; keep it from text to text, so that it learns.
 * @param start how many tokens of the prompt are in the engine's cache already.
 * @param clock measures passes and draft steps.
 * @param shift called when the context is full with the new tokens so far; returns the tokens that go on in place of prompt
 *     and answer, or null to end the text.
 * @param goOn called in each prefill, as by [Engine.prefill]; false stops it, and the text is `cancelled`.
 * @throws InputError as [checkPrompt] and [checkOptions], or, from [next], the rules leave no token to choose.
 */
internal class Rounds(
    private val engine: Engine,
    private val prompt: List<Int>,
    private val options: Options,
    private val stats: Stats,
    planner: DraftLength,
    private val start: Int = 0,
    private val clock: Clock = SYSTEM_CLOCK,
    private val shift: (List<Int>) -> List<Int>? = { null },
    private val goOn: (Int) -> Boolean = { true },
) : Iterator<Round> {
    init {
        checkPrompt(engine.manifest, prompt)
        checkOptions(engine.manifest, options)
        stats.begin(start)
    }

    private val rules = textChooser(engine, prompt, options.sampling, options.rules, options.thinkingBudget)
    private val ofText: Chooser = rules ?: Sampled(options.sampling)
    private var chooser = ofText
    private val drafts =
        options.numDraftTokens?.let { FixedDrafts(engine, it, rules) } ?: PlannedDrafts(engine, planner, prompt, rules)
    private var left = options.maxNewTokens
    private var room = engine.manifest.maxSeqLen - prompt.size
    private val answer = ArrayList<Int>()
    private var dropped = 0 // tokens that were left out
    private var shifted: Round? = null // the round after a shift, which was run already

    override fun hasNext() = stats.finishReason.isEmpty()

    override fun next(): Round {
        if (!hasNext()) throw NoSuchElementException()
        val again = shifted
        val verified = again == null && answer.isNotEmpty()
        val done = again ?: if (verified) round(answer.last()) else prefill(prompt, start)
        if (done.tokens.isEmpty()) {
            stats.finishReason = "cancelled"
            return done
        }
        if (again != null) stats.shift(dropped)
        shifted = null
        val end = done.tokens.indexOfFirst { it in engine.manifest.eos }
        val kept = done.cut(if (end < 0) done.tokens.size else end + 1)
        left -= kept.tokens.size
        room -= kept.tokens.size
        answer.addAll(kept.tokens)
        if (verified) stats.add(kept, drafts.source)
        if (end < 0 && left > 0 && room == 0) shift(answer)?.let(::runAgain)
        stats.finishReason = when {
            end >= 0 -> "eos"
            left == 0 -> "length"
            room == 0 -> "max_seq_len"
            shifted?.tokens?.isEmpty() == true -> "cancelled"
            else -> ""
        }
        return kept
    }

    /** Run what stays of a full context. */
    private fun runAgain(stays: List<Int>) {
        dropped = prompt.size + answer.size - stays.size
        room = engine.manifest.maxSeqLen - stays.size
        chooser = Displaced(ofText, dropped)
        shifted = prefill(stays, engine.cache.reusable(stays))
    }

    private fun prefill(tokens: List<Int>, start: Int): Round {
        val started = clock.seconds()
        val done = engine.prefill(tokens, chooser, start, goOn)
        stats.prefillSeconds += clock.seconds() - started
        return done
    }

    private fun round(last: Int): Round {
        val started = clock.seconds()
        // The bonus token takes one token of the budget as well.
        val proposed = drafts.make(last, minOf(engine.manifest.maxDraftTokens, left - 1, room - 1))
        val drafted = clock.seconds()
        val done = engine.verify(last, proposed, chooser)
        val ended = clock.seconds()
        drafts.learn(done, drafted - started, ended - drafted)
        stats.decodeSeconds += ended - started
        return done
    }
}

/**
 * Refuse options that a bundle cannot serve.
 *
 * @throws InputError K is negative or beyond what the bundle was exported for, no new token is asked for, or a rule names a
 *     token or a part that the bundle does not have.
 */
internal fun checkOptions(manifest: Manifest, options: Options) {
    val maxDrafts = manifest.maxDraftTokens
    if (options.numDraftTokens != null && options.numDraftTokens !in 0..maxDrafts) {
        throw InputError(
            "${options.numDraftTokens} draft tokens a round were asked for, the bundle was exported for up to $maxDrafts",
        )
    }
    if (options.maxNewTokens < 1) {
        throw InputError("${options.maxNewTokens} new tokens were asked for, expected at least 1")
    }
    checkRules(manifest, options.rules)
    checkParts(manifest, options.thinkingBudget)
}

/**
 * Refuse a prompt that cannot be run.
 *
 * @throws InputError the prompt is empty, leaves no room for an answer, or has an id that is not in the vocabulary.
 */
internal fun checkPrompt(manifest: Manifest, prompt: List<Int>) {
    if (prompt.isEmpty()) throw InputError("the prompt is empty: expected at least one token")
    if (prompt.size >= manifest.maxSeqLen) {
        throw InputError(
            "the prompt has ${prompt.size} tokens, the bundle's context has ${manifest.maxSeqLen} for prompt and answer" +
                " together; shorten it, leave out the oldest turns of a chat with WhenFull.SHIFT, or export with a larger" +
                " --max-seq-len",
        )
    }
    prompt.firstOrNull { it !in 0 until manifest.vocabSize }?.let {
        throw InputError("the prompt has token id $it, expected 0 to ${manifest.vocabSize - 1}")
    }
}
