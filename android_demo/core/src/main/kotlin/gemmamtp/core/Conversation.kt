package gemmamtp.core

import java.io.File

/**
 * A conversation with an open bundle. What a prompt shares with its last text is not run again. Texts of different
 * conversations may be generated in any order, token by token, on any threads; a conversation has one text at a time.
 *
 * [Decoder.conversation] begins one, [Decoder.openSession] goes on with a saved one.
 */
public class Conversation internal constructor(private val decoder: Decoder, internal val cache: Cache) {
    /** The newest text, the only one that goes on. */
    @Volatile internal var current: Stream? = null
        private set

    @Volatile private var reuse = true

    /** Bytes of its KV cache; that of a session that was opened is in memory as far as it was used. */
    public val numBytes: Long get() = cache.numBytes

    /** How many tokens fit after those that are in its KV cache. */
    public val tokensLeft: Int get() = decoder.manifest.maxSeqLen - cache.position

    /**
     * Continue a prompt. The same seed gives the same tokens, whatever is drafted.
     *
     * @param stop strings that end the text; they are not part of it.
     * @param progress see [PromptProgress].
     * @throws InputError the prompt cannot be run, an option is out of its range, or the bundle has no tokenizer.
     */
    @JvmOverloads
    public fun stream(
        prompt: String,
        options: Options,
        stop: List<String> = emptyList(),
        progress: PromptProgress = PromptProgress { _, _ -> },
    ): Stream = stream(requireTokenizer().encode(prompt), options, stop, progress)

    /** Continue a prompt of token ids that begin with the beginning-of-text token, as the other [stream] does. */
    @JvmOverloads
    public fun stream(
        prompt: IntArray,
        options: Options,
        stop: List<String> = emptyList(),
        progress: PromptProgress = PromptProgress { _, _ -> },
    ): Stream {
        val ids = prompt.toList()
        val shift = if (options.whenFull == WhenFull.SHIFT) TextShift(ids, decoder.manifest.maxSeqLen) else null
        return stream(ids, options, stop, shift, progress)
    }

    private fun stream(
        ids: List<Int>,
        options: Options,
        stop: List<String>,
        context: FullContext?,
        progress: PromptProgress,
    ): Stream {
        decoder.checkOpen()
        if (stop.isNotEmpty()) requireTokenizer()
        if (stop.any { it.isEmpty() }) throw InputError("a stop string is empty: expected some text")
        checkPrompt(decoder.manifest, ids)
        checkOptions(decoder.manifest, options)
        val tracker = PartTracker(decoder.manifest.channels, decoder.manifest.eos, ids)
        val texts = decoder.tokenizer?.stream(stop, ids) ?: TextStream({ _, _ -> "" }, tracker = tracker)
        return Stream(this, decoder, ids, options, texts, context, progress).also { current = it }
    }

    /**
     * Answer the last message of a conversation.
     *
     * With [WhenFull.SHIFT], the oldest turns of a chat that does not fit are left out, also in the middle of an answer. Pass
     * all messages in each turn all the same: what was left out before is left out again, and the cache is used. This waits
     * for a pass that runs.
     *
     * @param messages oldest first. An answer of this bundle is [Stream.message], what a tool answered is [toolMessage].
     * @param tools whether the model may call [Manifest.tools].
     * @param thinking whether the model thinks before it answers; null leaves it to the template.
     * @param progress see [PromptProgress].
     * @throws InputError as [stream]; or the bundle has no form of such prompts, or it does not allow the messages.
     */
    @JvmOverloads
    public fun chat(
        messages: List<Message>,
        options: Options,
        tools: Boolean = false,
        thinking: Boolean? = null,
        progress: PromptProgress = PromptProgress { _, _ -> },
    ): Stream {
        val template = decoder.chat ?: throw InputError("the bundle has no chat format; export it from a checkpoint that chats")
        val prompt = { kept: List<Message> ->
            requireTokenizer().encode(template.render(kept, tools, thinking)).toList()
        }
        if (options.whenFull == WhenFull.STOP) return stream(prompt(messages), options, emptyList(), null, progress)
        if (messages.isEmpty()) refuse("there are none")
        val shift = ChatShift(messages, decoder.manifest.maxSeqLen, prompt)
        // Not while a pass changes the cache: another thread may still be in an older text.
        return stream(decoder.exclusive { shift.begin(cache::reusable) }, options, emptyList(), shift, progress)
    }

    /** Let the next prompt be run as a whole, whatever it shares with the last text. */
    public fun forget() {
        reuse = false
    }

    /**
     * Save what was run so far to a session file, whole or not at all; other conversations wait meanwhile.
     *
     * The file has the tokens and their keys and values, not the messages; `openSession` and a prompt that begins with these
     * tokens go on from there.
     *
     * @throws InputError it cannot be written; a file that was there is as it was.
     */
    public fun save(file: File): Unit = decoder.exclusive { writeSession(file, decoder.manifest, cache, decoder.planner) }

    /** How many of a prompt's first tokens are in the cache already; called when the prompt is about to run. */
    internal fun takeReusable(prompt: List<Int>): Int {
        if (!reuse) cache.rollBack(0)
        reuse = true
        return cache.reusable(prompt)
    }

    private fun requireTokenizer() =
        decoder.tokenizer ?: throw InputError("the bundle has no tokenizer.json; export a checkpoint that has one")
}
