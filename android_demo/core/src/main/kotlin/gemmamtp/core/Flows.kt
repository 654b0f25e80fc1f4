package gemmamtp.core

import kotlinx.coroutines.CoroutineDispatcher
import kotlinx.coroutines.CoroutineStart
import kotlinx.coroutines.NonCancellable
import kotlinx.coroutines.asCoroutineDispatcher
import kotlinx.coroutines.channels.Channel
import kotlinx.coroutines.currentCoroutineContext
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.buffer
import kotlinx.coroutines.flow.channelFlow
import kotlinx.coroutines.flow.flowOn
import kotlinx.coroutines.launch
import kotlinx.coroutines.suspendCancellableCoroutine
import kotlinx.coroutines.withContext
import java.io.File
import java.util.concurrent.SynchronousQueue
import java.util.concurrent.ThreadPoolExecutor
import java.util.concurrent.TimeUnit

/** On Android nice -4, that of what is shown; threads that a runtime starts while it loads inherit it. */
private const val PRIORITY = 7

/**
 * Threads that wait for passes, and end when they have none. There is one for each text that is collected, so that a long
 * prompt gives way to others; passes run one at a time all the same.
 */
private val THREADS: CoroutineDispatcher by lazy {
    val make = { work: Runnable -> Thread(work, "gemma-mtp").apply { isDaemon = true; priority = PRIORITY } }
    ThreadPoolExecutor(0, Int.MAX_VALUE, 10, TimeUnit.SECONDS, SynchronousQueue(), make).asCoroutineDispatcher()
}

/**
 * Load a bundle as [openDecoder] does, on a thread of its own.
 *
 * It can be cancelled while files are checked; loading itself goes on to its end, and what was loaded is closed.
 */
public suspend fun loadDecoder(
    bundle: File,
    loadGraphs: LoadGraphs,
    deviceFolder: File? = null,
    device: Device = AnyDevice,
    threads: Int? = null,
    verify: Boolean = false,
    digest: String? = null,
    progress: Progress = Progress { _, _ -> },
): Decoder {
    var opened: Decoder? = null
    try {
        withContext(THREADS) {
            val context = currentCoroutineContext()
            opened = openDecoder(bundle, loadGraphs, deviceFolder, device, threads, verify, digest) { name, bytes ->
                progress.done(name, bytes)
                context.ensureActive()
            }
        }
        return checkNotNull(opened)
    } catch (error: Throwable) {
        opened?.closeAndJoin() // nobody else has it
        throw error
    }
}

/** Close a decoder as [Decoder.close] does, without blocking the caller's thread; it cannot be cancelled. */
public suspend fun Decoder.closeAndJoin(): Unit = withContext(THREADS + NonCancellable) { close() }

/**
 * The text's tokens as they come, which may be collected once.
 *
 * Passes run on threads of their own, at most one token ahead of the collector. If the collector is cancelled, or fails, the
 * text ends after the pass that runs, or the chunk of its prompt, and the collector ends after that; then the conversation
 * can be used. What [Stream.next] throws is thrown to the collector.
 */
public fun Stream.flow(): Flow<Token> = channelFlow {
    collect()
    // Called by whoever cancels, at once: this coroutine may be in a pass.
    val watch = launch(start = CoroutineStart.UNDISPATCHED) {
        suspendCancellableCoroutine<Unit> { it.invokeOnCancellation { cancel() } }
    }
    try {
        for (token in this@flow) send(token)
    } finally {
        watch.cancel()
        leave()
    }
}.flowOn(THREADS).buffer(Channel.RENDEZVOUS)
