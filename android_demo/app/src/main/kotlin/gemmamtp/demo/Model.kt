package gemmamtp.demo

import gemmamtp.core.Message
import gemmamtp.core.Options
import gemmamtp.core.Rules
import gemmamtp.core.Sampling
import gemmamtp.core.Token
import java.io.Closeable
import java.io.File

/** An open bundle as the app uses it. One thread at a time may use it; any thread may call [Writing.cancel]. */
interface Model : Closeable {
    /** Whether it answers conversations; otherwise it continues the last message as text. */
    val chats: Boolean

    /** Whether it can be asked to think before it answers. */
    val thinks: Boolean

    /** How many tokens of a conversation the model sees at most. */
    val contextTokens: Int

    /** The default number of drafts a round, K, of the bundle. */
    val defaultDraftTokens: Int

    /** How tokens are chosen, as the checkpoint recommends. */
    val sampling: Sampling

    /** What changes logits before that, as the checkpoint recommends. */
    val rules: Rules

    /**
     * Generate what follows the last message; throws InputError if the messages or options cannot be run.
     *
     * @param thinking whether to think before; false leaves it to the bundle.
     */
    fun write(messages: List<Message>, options: Options, thinking: Boolean = false): Writing

    /** Let the next prompt be run as a whole, whatever it shares with the last text. */
    fun forget()
}

/** One text that is being generated. */
interface Writing : Iterator<Token> {
    /** Counts and times so far. */
    val counts: Counts

    /** End the text with its next token; any thread may call it. */
    fun cancel()
}

/**
 * Counts and times of a text.
 *
 * @property rounds rounds so far.
 * @property tokens number of new tokens.
 * @property decodeSeconds time of all rounds, without the prefill.
 * @property acceptanceRate accepted drafts / drafts; null if there were none.
 * @property tokensPerRound mean tokens per round; null before the first round.
 * @property lastDrafted drafts of the newest round; null before the first.
 * @property tokensLeft tokens that the context has room for after the newest one.
 * @property droppedMessages how many of the oldest messages are no longer in the context.
 * @property finish why the text ended, as `Stats.finishReason`; empty while it is generated.
 * @property prefillSeconds time of the prompt.
 */
data class Counts(
    val rounds: Int = 0,
    val tokens: Int = 0,
    val decodeSeconds: Double = 0.0,
    val acceptanceRate: Double? = null,
    val tokensPerRound: Double? = null,
    val lastDrafted: Int? = null,
    val tokensLeft: Int = 0,
    val droppedMessages: Int = 0,
    val finish: String = "",
    val prefillSeconds: Double = 0.0,
) {
    /** Without the first token, which comes from the prefill; null before the second. */
    val tokensPerSecond: Double? get() = if (tokens > 1 && decodeSeconds > 0) (tokens - 1) / decodeSeconds else null
}

/** Makes models from bundles on disk. */
interface Opener {
    /** The largest number of bytes that an open bundle takes; throws InputError if the directory is no bundle. */
    fun memoryNeeded(bundle: File): Long

    /** Open a bundle, after checking the files that may have changed since they were checked. Throws InputError. */
    fun open(bundle: File, report: Report): Model
}
