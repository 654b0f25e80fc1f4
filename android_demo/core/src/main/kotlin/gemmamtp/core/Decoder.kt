package gemmamtp.core

import java.io.Closeable
import java.io.File
import java.io.IOException

/**
 * A new token, the text that it completes, and its log-probability (see [logProbability]).
 *
 * The text may be empty: where a token ends inside a character, or a stop string may be about to begin.
 */
class Token(val id: Int, val text: String, val logprob: Double)

/**
 * A bundle, ready to write: what an app holds. It writes one text at a time, on one thread at a time, and what a text
 * shares with the last is not run again.
 *
 * @param keep is called after each text, and keeps what was measured.
 */
class Decoder(
    private val engine: Engine,
    val tokenizer: Tokenizer?,
    val chat: ChatTemplate?,
    private val length: DraftLength,
    private val clock: Clock = SYSTEM_CLOCK,
    private val keep: () -> Unit = {},
) : Closeable {
    val manifest: Manifest get() = engine.manifest
    private var current: Stream? = null
    private var written: Stream? = null // the one whose keys and values are in the engine's cache

    /**
     * Continue a prompt. The same seed gives the same tokens, whatever is drafted.
     *
     * @param stop strings that end the text; they are not part of it.
     * @throws InputError for a prompt that cannot be run, or impossible options.
     */
    fun stream(prompt: String, options: Options, stop: List<String> = emptyList()): Stream =
        stream(requireTokenizer().encode(prompt), options, stop)

    fun stream(prompt: IntArray, options: Options, stop: List<String> = emptyList()): Stream {
        if (stop.isNotEmpty()) requireTokenizer()
        if (stop.any { it.isEmpty() }) throw InputError("a stop string is empty: expected some text")
        checkPrompt(manifest, prompt.asList())
        checkOptions(manifest, options)
        return Stream(prompt.toList(), options, tokenizer?.stream(stop)).also { current = it }
    }

    /** Answer the last of the messages; throws InputError as [stream] does, and if the bundle has no form for them. */
    fun chat(messages: List<Message>, options: Options): Stream {
        val template = chat ?: throw InputError("the bundle has no chat format; export it from a checkpoint that chats")
        return stream(template.render(messages), options)
    }

    /** Run the next prompt as a whole. */
    fun forget() {
        written = null
    }

    override fun close() {
        (engine as? Closeable)?.close()
    }

    private fun requireTokenizer() =
        tokenizer ?: throw InputError("the bundle has no tokenizer.json; export a checkpoint that has one")

    /** How many of the prompt's first tokens are in the cache still; the last one is always run. */
    private fun reusable(prompt: List<Int>): Int {
        val cached = written?.let { (it.prompt + it.tokens).take(engine.position) } ?: return 0
        val shared = cached.zip(prompt.dropLast(1)).takeWhile { (old, new) -> old == new }.size
        return if (engine.keeps(shared)) shared else 0
    }

    /** The new tokens of one text, which may be left or cancelled at any time. */
    inner class Stream internal constructor(
        internal val prompt: List<Int>,
        private val options: Options,
        private val texts: TextStream?,
    ) : Iterator<Token> {
        val stats = Stats()
        private val new = ArrayList<Int>()
        private val pending = ArrayDeque<Token>()
        private val found = StringBuilder()
        private var rounds: Rounds? = null
        private var ended = false

        @Volatile private var cancelled = false

        val tokens: List<Int> get() = new
        val text: String get() = found.toString()

        /** The newest round, null before the first. */
        var lastRound: Round? = null
            private set

        /** End the text with the next token; may be called from any thread. */
        fun cancel() {
            cancelled = true
        }

        override fun hasNext() = !ended

        override fun next(): Token {
            check(current === this) { "another text was started with this decoder; it writes one at a time" }
            if (ended) throw NoSuchElementException()
            if (pending.isEmpty()) decide()
            var token = pending.removeFirst()
            val last = cancelled || (stats.finishReason.isNotEmpty() && pending.isEmpty())
            val text = texts?.add(token.id, last) ?: ""
            if (texts?.stopped == true) stats.finishReason = "stop" else if (cancelled) stats.finishReason = "cancelled"
            ended = last || texts?.stopped == true
            if (ended) keep()
            token = Token(token.id, text, token.logprob)
            new.add(token.id)
            found.append(text)
            return token
        }

        /** The tokens of the next round. */
        private fun decide() {
            val open = rounds ?: Rounds(engine, prompt, options, stats, length, reusable(prompt), clock).also {
                rounds = it
                written = null // until the prefill is done
            }
            val round = open.next()
            written = this
            lastRound = round
            round.tokens.zip(round.logprobs) { id, logprob -> pending.addLast(Token(id, "", logprob)) }
        }
    }
}

typealias Stream = Decoder.Stream

/**
 * Load a bundle.
 *
 * What passes cost is measured while it writes, and kept in [costsFile] for the next time.
 *
 * @param threads threads inside an operation; null lets the backend choose.
 * @param costsFile outside of the bundle, which is the same on all devices; null keeps nothing. One that cannot be read
 *     is measured and written anew.
 * @param verify compare every file's sha256 with the manifest's, needed once after a bundle was copied.
 * @param progress told of the files as they are verified.
 * @throws InputError not a bundle, incomplete, changed, or not for these runtimes.
 */
fun openDecoder(
    bundle: File,
    loadGraphs: LoadGraphs,
    threads: Int? = null,
    costsFile: File? = null,
    verify: Boolean = true,
    progress: Progress = Progress { _, _ -> },
): Decoder {
    val manifest = readManifest(bundle)
    if (verify) {
        changedFiles(bundle, manifest, progress).firstOrNull()?.let {
            throw InputError("${File(bundle, it)}: sha256 differs from the manifest's; copy the bundle again")
        }
    }
    val tokenizer = if (File(bundle, TOKENIZER).exists()) Tokenizer(bundle, manifest) else null
    val costs = try {
        costsFile?.let { loadCosts(it, manifest, threads) }
    } catch (_: InputError) {
        null // nobody can delete it in an app's own storage: it is written anew
    } ?: Costs(manifest.maxDraftTokens, manifest.rowMultiple)
    val length = DraftLength(manifest.maxDraftTokens, costs)
    val engine = loadEngine(bundle, manifest, loadGraphs, threads)
    val keep = {
        try {
            costsFile?.let { saveCosts(costs, it, manifest, threads) }
        } catch (error: IOException) {
            // No room left: they are measured again next time, which costs a few rounds.
        }
        Unit
    }
    return Decoder(engine, tokenizer, if (tokenizer == null) null else manifest.chat?.let(::ChatTemplate), length, keep = keep)
}
