package gemmamtp.core

import java.util.concurrent.atomic.AtomicBoolean
import kotlinx.coroutines.flow.Flow

private const val ID_DIGITS = 9 // some chat templates ask for so many

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
public class Token(
    public val id: Int,
    public val text: String,
    public val logprob: Double,
    public val part: String = ANSWER,
    public val partText: String = "",
)

/** Receives how far a prompt is. */
public fun interface PromptProgress {
    /**
     * Called before the prompt is run and after each chunk of it. It may neither ask a text of the decoder for tokens, nor
     * save a conversation, nor close the decoder, nor wait for another thread that does.
     *
     * @param done tokens of the prompt that are in the cache.
     * @param total tokens of the prompt.
     */
    public fun at(done: Int, total: Int)
}

/**
 * An iterator over the new tokens of one text of a conversation, which may be left or cancelled at any time. One thread at a
 * time may use it, except for [cancel]; it waits for what other conversations of the decoder run.
 *
 * @property stats counts and times so far.
 * @property progress may be set until the first token is asked for.
 */
public class Stream internal constructor(
    private val conversation: Conversation,
    private val decoder: Decoder,
    private val prompt: List<Int>,
    private val options: Options,
    private val texts: TextStream,
    private val context: FullContext?,
    public var progress: PromptProgress,
) : Iterator<Token> {
    public val stats: Stats = Stats()
    private val manifest get() = decoder.manifest
    private val new = ArrayList<Int>()
    private val pending = ArrayDeque<Token>()
    private val newText = StringBuilder()
    private var rounds: Rounds? = null
    private var ended = false
    private var reason = "" // why the text ends with the newest round; empty if it does not

    private var toRun = prompt.size // tokens of the prefill

    @Volatile private var cancelled = false

    /** Whether it is collected as a flow. */
    internal val collected = AtomicBoolean()

    /** Ids of the new tokens so far. */
    public val tokens: List<Int> get() = new

    /** How many tokens there is room for in the context after the newest one. */
    public val tokensLeft: Int get() = manifest.maxSeqLen - prompt.size - new.size + stats.droppedTokens

    /** How many messages of a chat, after its system prompt, were left out because the context was full. */
    public val droppedMessages: Int get() = context?.droppedMessages ?: 0

    /** The answer's text so far. */
    public val text: String get() = newText.toString()

    /** What the model thought so far; thoughts that an answer comes between are on lines of their own. */
    public val thought: String
        get() = channels(THOUGHT).map { it.text }.filter { it.isNotEmpty() }.joinToString("\n")

    /** The calls of tools so far; one that is malformed, or that the text's end cut off, has a `problem`. */
    public val calls: List<ToolCall>
        get() {
            val form = manifest.parts[TOOL_CALL] ?: PartForm()
            return channels(TOOL_CALL).filter { it.closed || ended }
                .map { readCall(it.text, form, "${prompt.size + it.start}".padStart(ID_DIGITS, '0'), it.closed) }
        }

    /**
     * The answer as a message of the conversation, for the next turn. Calls that could not be read are left out, and blank
     * content beside calls, which some templates would count.
     */
    public val message: Message
        get() {
            val whole = calls.filter { it.problem.isEmpty() }
            val content = if (whole.isNotEmpty() && text.all(::isBlank)) "" else text
            return Message("assistant", content, whole, thought)
        }

    /** The newest round; null before the first. */
    public var lastRound: Round? = null
        private set

    /**
     * End the text with its next token; may be called from any thread. While the prompt is run, the text ends after the
     * current chunk of it, without a token.
     */
    public fun cancel() {
        cancelled = true
    }

    /**
     * The tokens as a cold flow, which one collector may collect, once. Passes run on threads of the decoder.
     *
     * A pass runs while its token is awaited, not while the collector has one, which may thus read the text and its
     * [stats]; after `buffer(1)` the next token is made meanwhile, and these are to be read after the last.
     *
     * A collector that is cancelled waits for the pass that runs, in a prompt for its current chunk, whose token it does not
     * get. Then, as after an exception of the collector, `take` or `first`, the text has ended, and its conversation can be
     * used. An error of the text, as [next] throws it, is that of the collection.
     *
     * It is a member, because the extension `asFlow` of iterators would run passes on the collector's thread.
     */
    public fun asFlow(): Flow<Token> = tokenFlow(this, decoder)

    /** Whether there is another token; runs the prompt, if it was not run yet, since it may be cancelled. */
    override fun hasNext(): Boolean {
        if (rounds == null && !ended) decide()
        return !ended
    }

    /** The next token; throws IllegalStateException after the decoder was closed, or another text was started. */
    override fun next(): Token {
        decoder.checkOpen()
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
        if (ended) decoder.saveCosts()
        token = Token(token.id, piece.text, token.logprob, piece.part, piece.partText)
        new.add(token.id)
        newText.append(piece.text)
        return token
    }

    /** End the text where it is: nobody takes more of its tokens. */
    internal fun leave() {
        if (ended) return
        ended = true
        stats.finishReason = "cancelled"
        decoder.saveCosts()
    }

    private fun checkCurrent() =
        check(conversation.current === this) { "another text was started in this conversation; it has one at a time" }

    private fun channels(name: String) = texts.channels.filter { it.name == name }

    /** The tokens of the next round; none, and the text has ended, if the prefill was stopped. */
    private fun decide() = decoder.exclusive {
        resume()
        val open = rounds ?: begin().also { rounds = it }
        ended = true // where the next line throws: the text lacks a round then
        val round = open.next()
        if (round.tokens.isEmpty()) return@exclusive
        ended = false
        // The text has not ended before the last of these tokens is given out.
        reason = stats.finishReason
        stats.finishReason = ""
        lastRound = round
        round.tokens.zip(round.logprobs) { id, logprob -> pending.addLast(Token(id, "", logprob)) }
    }

    /** Let the engine run this conversation. */
    private fun resume() {
        checkCurrent()
        decoder.engine.cache = conversation.cache
    }

    private fun shift(answer: List<Int>) = context?.shift(answer)?.also { toRun = it.size }

    private fun begin() = Rounds(
        decoder.engine, prompt, options, stats, decoder.planner, conversation.takeReusable(prompt), decoder.clock, ::shift,
    ) { done ->
        progress.at(done, toRun)
        if (done < toRun && !cancelled) { // outputs of the last chunk are still to be read
            decoder.giveWay()
            resume()
        }
        !cancelled
    }
}
