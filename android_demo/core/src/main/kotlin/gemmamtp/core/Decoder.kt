package gemmamtp.core

import java.io.Closeable
import java.io.File
import java.io.IOException

/**
 * A new token.
 *
 * @property id token id.
 * @property text the text of the answer that the token completes; empty in a thought or a call of a tool, and where it ends
 *     inside a character, or in what may become a stop string.
 * @property logprob natural logarithm of its probability, as [logProbability] defines it.
 * @property part what the token belongs to: `answer`, `thought`, `tool_call`, or another channel of the bundle.
 * @property partText the text of that part that the token completes; the same as [text] in the answer.
 */
class Token(
    val id: Int,
    val text: String,
    val logprob: Double,
    val part: String = ANSWER,
    val partText: String = "",
)

/**
 * An open bundle, which generates one text at a time, on one thread at a time. What a prompt shares with the last text is
 * not run again. Apps call [openDecoder].
 *
 * @property tokenizer the bundle's; null if it has none.
 * @property chat forms of the prompts of conversations; null if the bundle has none.
 * @param planner chooses the number of drafts of each round.
 * @param clock measures passes and draft steps.
 * @param save called after each text to save measured costs.
 */
class Decoder(
    private val engine: Engine,
    val tokenizer: Tokenizer?,
    val chat: ChatTemplate?,
    private val planner: DraftLength,
    private val clock: Clock = SYSTEM_CLOCK,
    private val save: () -> Unit = {},
) : Closeable {
    /** The bundle's manifest. */
    val manifest: Manifest get() = engine.manifest
    private var current: Stream? = null
    private var reuse = true

    /**
     * Continue a prompt. The same seed gives the same tokens, whatever is drafted.
     *
     * @param stop strings that end the text; they are not part of it.
     * @param progress see [Stream.progress].
     * @throws InputError the prompt cannot be run, an option is out of its range, or the bundle has no tokenizer.
     */
    fun stream(
        prompt: String,
        options: Options,
        stop: List<String> = emptyList(),
        progress: (Int, Int) -> Unit = { _, _ -> },
    ): Stream = stream(requireTokenizer().encode(prompt), options, stop, progress)

    /** Continue a prompt of token ids that begin with the beginning-of-text token, as the other [stream] does. */
    fun stream(
        prompt: IntArray,
        options: Options,
        stop: List<String> = emptyList(),
        progress: (Int, Int) -> Unit = { _, _ -> },
    ): Stream {
        if (stop.isNotEmpty()) requireTokenizer()
        if (stop.any { it.isEmpty() }) throw InputError("a stop string is empty: expected some text")
        checkPrompt(manifest, prompt.asList())
        checkOptions(manifest, options)
        val ids = prompt.toList()
        val texts = tokenizer?.stream(stop, ids)
            ?: TextStream({ _, _ -> "" }, tracker = PartTracker(manifest.channels, manifest.eos, ids))
        return Stream(ids, options, texts, progress).also { current = it }
    }

    /**
     * Answer the last message of a conversation.
     *
     * @param messages oldest first. An answer of this bundle is [Stream.message], what a tool answered is [toolMessage].
     * @param tools whether the model may call [Manifest.tools].
     * @param thinking whether the model thinks before it answers; null leaves it to the template.
     * @param progress see [Stream.progress].
     * @throws InputError as [stream]; or the bundle has no form of such prompts, or it does not allow the messages.
     */
    fun chat(
        messages: List<Message>,
        options: Options,
        tools: Boolean = false,
        thinking: Boolean? = null,
        progress: (Int, Int) -> Unit = { _, _ -> },
    ): Stream {
        val template = chat ?: throw InputError("the bundle has no chat format; export it from a checkpoint that chats")
        return stream(template.render(messages, tools, thinking), options, progress = progress)
    }

    /** Let the next prompt be run as a whole, whatever it shares with the last text. */
    fun forget() {
        reuse = false
    }

    /** Close the engine; neither the decoder nor its streams can be used after that. */
    override fun close() {
        (engine as? Closeable)?.close()
    }

    private fun requireTokenizer() =
        tokenizer ?: throw InputError("the bundle has no tokenizer.json; export a checkpoint that has one")

    /** How many of a prompt's first tokens are in the cache already; called when the prompt is about to run. */
    private fun begin(prompt: List<Int>): Int = (if (reuse) engine.cache.reusable(prompt) else 0).also { reuse = true }

    /**
     * An iterator over the new tokens of one text, which may be left or cancelled at any time.
     *
     * @property stats counts and times so far.
     * @property progress called with how many tokens of the prompt are in the cache and how many it has, before the prompt is
     *     run and after each chunk of it; may be set until the first token is asked for.
     */
    inner class Stream internal constructor(
        private val prompt: List<Int>,
        private val options: Options,
        private val texts: TextStream,
        var progress: (Int, Int) -> Unit,
    ) : Iterator<Token> {
        val stats = Stats()
        private val new = ArrayList<Int>()
        private val pending = ArrayDeque<Token>()
        private val newText = StringBuilder()
        private var rounds: Rounds? = null
        private var ended = false
        private var reason = "" // why the text ends with the newest round; empty if it does not

        @Volatile private var cancelled = false

        /** Ids of the new tokens so far. */
        val tokens: List<Int> get() = new

        /** The answer's text so far. */
        val text: String get() = newText.toString()

        /** What the model thought so far; thoughts that an answer comes between are on lines of their own. */
        val thought: String
            get() = channels(THOUGHT).map { it.text }.filter { it.isNotEmpty() }.joinToString("\n")

        /** The calls of tools so far; one that is malformed, or that the text's end cut off, has a `problem`. */
        val calls: List<ToolCall>
            get() {
                val form = manifest.parts[TOOL_CALL] ?: PartForm()
                return channels(TOOL_CALL).filter { it.closed || ended }
                    .map { readCall(it.text, form, "${prompt.size + it.start}".padStart(ID_DIGITS, '0'), it.closed) }
            }

        /**
         * The answer as a message of the conversation, for the next turn. Calls that could not be read are left out, and
         * blank content beside calls, which some templates would count.
         */
        val message: Message
            get() {
                val whole = calls.filter { it.problem.isEmpty() }
                val content = if (whole.isNotEmpty() && text.all(::isBlank)) "" else text
                return Message("assistant", content, whole, thought)
            }

        /** The newest round; null before the first. */
        var lastRound: Round? = null
            private set

        /**
         * End the text with its next token; may be called from any thread. While the prompt is run, the text ends after the
         * current chunk of it, without a token.
         */
        fun cancel() {
            cancelled = true
        }

        /** Whether there is another token; runs the prompt, if it was not run yet, since it may be cancelled. */
        override fun hasNext(): Boolean {
            if (rounds == null && !ended) decide()
            return !ended
        }

        override fun next(): Token {
            checkCurrent()
            if (!hasNext()) throw NoSuchElementException()
            if (pending.isEmpty()) decide()
            var token = pending.removeFirst()
            val round = checkNotNull(lastRound)
            stats.count(round.cut(round.tokens.size - pending.size))
            val complete = reason.isNotEmpty() && pending.isEmpty()
            val cut = cancelled && !complete
            val piece = texts.add(token.id, complete || cut)
            if (texts.stopped) stats.finishReason = "stop"
            else if (complete || cut) stats.finishReason = if (complete) reason else "cancelled"
            ended = complete || cut || texts.stopped
            if (ended) save()
            token = Token(token.id, piece.text, token.logprob, piece.part, piece.partText)
            new.add(token.id)
            newText.append(piece.text)
            return token
        }

        private fun checkCurrent() =
            check(current === this) { "another text was started with this decoder; it generates one at a time" }

        private fun channels(name: String) = texts.channels.filter { it.name == name }

        /** The tokens of the next round; none, and the text has ended, if the prefill was stopped. */
        private fun decide() {
            checkCurrent()
            val open = rounds ?: Rounds(engine, prompt, options, stats, planner, begin(prompt), clock) { done ->
                progress(done, prompt.size)
                !cancelled
            }.also { rounds = it }
            ended = true // where the next line throws: the text lacks a round then
            val round = open.next()
            if (round.tokens.isEmpty()) return
            ended = false
            // The text has not ended before the last of these tokens is given out.
            reason = stats.finishReason
            stats.finishReason = ""
            lastRound = round
            round.tokens.zip(round.logprobs) { id, logprob -> pending.addLast(Token(id, "", logprob)) }
        }
    }
}

typealias Stream = Decoder.Stream

private const val ID_DIGITS = 9 // some chat templates ask for so many

/**
 * Load a bundle.
 *
 * Times of passes are measured while it generates, and saved in [costsFile] for the next time.
 *
 * @param bundle directory written by `export`.
 * @param loadGraphs the runtimes.
 * @param threads threads inside an operation; null lets the backend choose.
 * @param costsFile a file outside of the bundle, which is the same on all devices; null saves nothing. One that cannot be
 *     read is replaced.
 * @param verify compare every file's sha256 with the manifest's, needed once after a bundle was copied.
 * @param progress receives the files as they are verified.
 * @param digest hexadecimal sha256 of the manifest, as `export` printed it: another bundle is refused. null for any.
 * @throws InputError the directory is no bundle, or an incomplete or changed one, or none for these runtimes.
 */
fun openDecoder(
    bundle: File,
    loadGraphs: LoadGraphs,
    threads: Int? = null,
    costsFile: File? = null,
    verify: Boolean = true,
    progress: Progress = Progress { _, _ -> },
    digest: String? = null,
): Decoder {
    val manifest = readManifest(bundle, digest)
    if (verify) {
        changedFiles(bundle, manifest, progress).firstOrNull()?.let {
            throw InputError("${File(bundle, it)}: sha256 differs from the manifest's; copy the bundle again")
        }
    }
    val tokenizer = if (File(bundle, TOKENIZER).exists()) Tokenizer(bundle, manifest) else null
    val costs = try {
        costsFile?.let { loadCosts(it, manifest, threads) }
    } catch (_: InputError) {
        null // nobody can delete it in an app's own storage, so it is replaced
    } ?: Costs(manifest.maxDraftTokens, manifest.rowMultiple)
    val planner = DraftLength(manifest.maxDraftTokens, costs)
    val engine = loadEngine(bundle, manifest, loadGraphs, threads)
    val save = {
        try {
            costsFile?.let { saveCosts(costs, it, manifest, threads) }
        } catch (error: IOException) {
            // There is no room left: costs are measured again next time, in a few rounds.
        }
        Unit
    }
    val template = if (tokenizer == null) null else chatTemplate(manifest)
    return Decoder(engine, tokenizer, template, planner, save = save)
}
