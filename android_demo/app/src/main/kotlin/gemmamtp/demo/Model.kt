package gemmamtp.demo

import gemmamtp.core.Message
import gemmamtp.core.Options
import gemmamtp.core.Sampling
import gemmamtp.core.Token
import java.io.Closeable
import java.io.File

/** An open bundle as the app uses it. One thread at a time may use it; [Writing.cancel] alone is for any thread. */
interface Model : Closeable {
    /** Whether it answers a conversation; otherwise it continues the newest message as text. */
    val chats: Boolean

    /** Drafts a round that the bundle was exported for. */
    val defaultDraftTokens: Int

    /** How the bundle wants tokens to be chosen. */
    val sampling: Sampling

    /** Write what follows the last of the messages; throws InputError for what cannot be run. */
    fun write(messages: List<Message>, options: Options): Writing

    /** Run the next prompt as a whole. */
    fun forget()
}

/** One text that is being written. */
interface Writing : Iterator<Token> {
    /** What it took so far. */
    val counts: Counts

    /** End the text with the next token; any thread may call it. */
    fun cancel()
}

/**
 * What a text took.
 *
 * @property decodeSeconds time of all rounds, without the prefill.
 * @property acceptanceRate accepted drafts over drafts, null if there were none.
 * @property tokensPerRound null before the first round.
 * @property lastDrafted drafts of the newest round, null before the first.
 * @property finish why the text ended, empty while it is written.
 */
data class Counts(
    val tokens: Int = 0,
    val decodeSeconds: Double = 0.0,
    val acceptanceRate: Double? = null,
    val tokensPerRound: Double? = null,
    val lastDrafted: Int? = null,
    val finish: String = "",
) {
    /** The first token comes from the prefill, so it does not count. Null before the second. */
    val tokensPerSecond: Double? get() = if (tokens > 1 && decodeSeconds > 0) (tokens - 1) / decodeSeconds else null
}

/** Makes models from bundles on disk. */
interface Opener {
    /** Bytes of memory that an open bundle takes at most; throws InputError if the directory is not a bundle. */
    fun memoryNeeded(bundle: File): Long

    /** Open a bundle; with [verify] every file is checked against the manifest first. Throws InputError. */
    fun open(bundle: File, verify: Boolean, report: Report): Model
}
