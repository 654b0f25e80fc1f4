@file:JvmName("Decoders")

package gemmamtp.core

import java.io.Closeable
import java.io.File
import java.io.IOException
import java.nio.ByteBuffer
import java.util.concurrent.locks.ReentrantLock
import kotlin.concurrent.withLock

private const val COSTS = "costs.json" // in a device's folder

/**
 * An open bundle, and any number of conversations with it. Any thread may use any of them: one runs at a time, the others
 * wait, and between the chunks of a prompt and between rounds they take turns. Apps call [openDecoder].
 *
 * @property tokenizer the bundle's; null if it has none.
 * @property chat forms of the prompts of conversations; null if the bundle has none.
 * @param planner chooses the number of drafts of each round.
 * @param clock measures passes and draft steps.
 * @param save called after each text to save measured costs.
 * @param allocate see [Cache].
 */
public class Decoder internal constructor(
    internal val engine: Engine,
    public val tokenizer: Tokenizer?,
    public val chat: ChatTemplate?,
    internal val planner: DraftLength,
    internal val clock: Clock = SYSTEM_CLOCK,
    private val save: () -> Unit = {},
    private val allocate: (Long) -> ByteBuffer = ::direct,
) : Closeable {
    /** The bundle's manifest. */
    public val manifest: Manifest get() = engine.manifest
    private val lock = ReentrantLock(true) // fair: else the thread that gives way takes it back at once
    private val first = Conversation(this, engine.cache)

    @Volatile private var closed = false

    /** Threads of coroutines. */
    internal var workers = DecoderThreads()

    /** The checkpoint's sampling and repetition penalty, and in each round as many drafts as are fastest. */
    @JvmOverloads
    public fun options(maxNewTokens: Int = 128): Options =
        Options(maxNewTokens, null, manifest.sampling, Rules(repetitionPenalty = manifest.repetitionPenalty))

    /** Begin another conversation; its memory is freed with it. */
    public fun conversation(): Conversation {
        checkOpen()
        return Conversation(this, Cache(manifest, allocate))
    }

    /**
     * Go on with a conversation that [Conversation.save] saved, in milliseconds: nothing is run again, and its memory is that
     * of the file, until it grows.
     *
     * What the planner of drafts had learnt is taken over, unless this decoder has written a text already.
     *
     * @param file must stay as it is while the conversation is used; it may be deleted, or replaced by another one.
     * @throws InputError the file cannot be read, is malformed, or was saved with another bundle.
     */
    public fun openSession(file: File): Conversation =
        exclusive { Conversation(this, readSession(file, manifest, planner, allocate)) }

    /** Continue a prompt in the decoder's first conversation, as [Conversation.stream] does. */
    @JvmOverloads
    public fun stream(
        prompt: String,
        options: Options,
        stop: List<String> = emptyList(),
        progress: PromptProgress = PromptProgress { _, _ -> },
    ): Stream = first.stream(prompt, options, stop, progress)

    /** Continue a prompt of token ids in the decoder's first conversation, as [Conversation.stream] does. */
    @JvmOverloads
    public fun stream(
        prompt: IntArray,
        options: Options,
        stop: List<String> = emptyList(),
        progress: PromptProgress = PromptProgress { _, _ -> },
    ): Stream = first.stream(prompt, options, stop, progress)

    /** Answer the last message in the decoder's first conversation, as [Conversation.chat] does. */
    @JvmOverloads
    public fun chat(
        messages: List<Message>,
        options: Options,
        tools: Boolean = false,
        thinking: Boolean? = null,
        progress: PromptProgress = PromptProgress { _, _ -> },
    ): Stream = first.chat(messages, options, tools, thinking, progress)

    /** Let the next prompt of the decoder's first conversation be run as a whole, as [Conversation.forget] does. */
    public fun forget(): Unit = first.forget()

    /**
     * Wait for the pass that is running, and close the engine; neither the decoder nor its conversations can be used after
     * that. A prompt ends with its current chunk. To close again does nothing.
     */
    override fun close() {
        checkOutside()
        lock.withLock {
            if (closed) return
            closed = true
            workers.end()
            (engine as? Closeable)?.close()
        }
    }

    /** Run what uses the engine, a cache or the planner, once no other thread does. */
    internal fun <T> exclusive(work: () -> T): T {
        checkOutside()
        return lock.withLock {
            checkOpen()
            work()
        }
    }

    /** Let threads that wait in [exclusive] run, in the middle of this thread's turn. */
    internal fun giveWay() {
        lock.unlock()
        lock.lock()
        checkOpen()
    }

    internal fun saveCosts() = lock.withLock(save)

    internal fun checkOpen() = check(!closed) { "the decoder was closed; open the bundle again" }

    private fun checkOutside() =
        check(!lock.isHeldByCurrentThread) { "asked for within a pass of this decoder; ask after the pass" }
}

/**
 * Load a bundle.
 *
 * Times of passes are measured while it generates, and kept in [deviceFolder] for the next time, with a record of the files
 * that were checked: those that have not changed since are not read again.
 *
 * @param bundle directory written by `export`.
 * @param loadGraphs the runtimes.
 * @param deviceFolder a folder for what belongs to this bundle on this device, outside of the bundle, which is the same on all
 *     devices; null keeps nothing. What cannot be read in it is replaced.
 * @param device gives memory for keys and values, and knows cores and heat: on Android an `AndroidDevice`.
 * @param threads threads inside an operation; null takes the device's fast cores.
 * @param verify whether to read every file, not only those that may have changed since they were read.
 * @param digest hexadecimal sha256 of the manifest, as `export` printed it: another bundle is refused. null for any.
 * @param progress receives the files as they are checked.
 * @throws InputError the directory is no bundle, or an incomplete or changed one, or none for these runtimes.
 */
@JvmOverloads
public fun openDecoder(
    bundle: File,
    loadGraphs: LoadGraphs,
    deviceFolder: File? = null,
    device: Device = AnyDevice,
    threads: Int? = null,
    verify: Boolean = false,
    digest: String? = null,
    progress: Progress = Progress { _, _ -> },
): Decoder {
    requireWideProcess(bundle, System.getProperty("os.arch"))
    val manifest = readManifest(bundle, digest)
    firstChangedFile(bundle, manifest, deviceFolder, verify, progress)?.let {
        throw InputError("${File(bundle, it)}: sha256 differs from the manifest's; copy the bundle again")
    }
    val count = threads ?: device.fastCores
    val costsFile = deviceFolder?.let { File(it, COSTS) }
    val tokenizer = if (File(bundle, TOKENIZER).exists()) Tokenizer(bundle, manifest) else null
    val costs = try {
        costsFile?.let { loadCosts(it, manifest, count) }
    } catch (_: InputError) {
        null // nobody can delete it in an app's own storage, so it is replaced
    } ?: Costs(manifest.maxDraftTokens, manifest.rowMultiple)
    val planner = DraftLength(manifest.maxDraftTokens, costs)
    val watch = Watch(device, costs)
    val load = LoadGraphs { folder, its, number -> watch.watched(loadGraphs.load(folder, its, number)) }
    val engine = loadEngine(bundle, manifest, load, count, device::allocate)
    val save = {
        try {
            costsFile?.takeIf { watch.cool }?.let {
                it.parentFile.mkdirs()
                saveCosts(costs, it, manifest, count)
            }
        } catch (error: IOException) {
            // There is no room left: costs are measured again next time, in a few rounds.
        }
        Unit
    }
    val template = if (tokenizer == null) null else chatTemplate(manifest)
    return Decoder(engine, tokenizer, template, planner, save = save, allocate = device::allocate)
}

/** Refuse a process of 32 bits: it has no room to map weights. */
internal fun requireWideProcess(bundle: File, architecture: String) {
    if ("64" in architecture) return
    throw InputError(
        "$bundle: this process has 32 bits ($architecture), expected 64; install the app with the libraries of arm64-v8a, and" +
            " leave android:use32bitAbi out",
    )
}
