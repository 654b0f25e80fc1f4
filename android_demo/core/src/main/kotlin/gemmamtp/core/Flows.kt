package gemmamtp.core

import java.io.File
import java.util.concurrent.SynchronousQueue
import java.util.concurrent.ThreadPoolExecutor
import java.util.concurrent.TimeUnit
import kotlinx.coroutines.CoroutineDispatcher
import kotlinx.coroutines.CoroutineStart
import kotlinx.coroutines.NonCancellable
import kotlinx.coroutines.asCoroutineDispatcher
import kotlinx.coroutines.coroutineScope
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.flow
import kotlinx.coroutines.launch
import kotlinx.coroutines.suspendCancellableCoroutine
import kotlinx.coroutines.withContext

/** Nice -4 on Android, as for what is shown on the screen. */
private const val PRIORITY = 7

/** How long a thread without work stays; the next work then has another one. */
private const val IDLE_SECONDS = 60L

/**
 * Load a bundle as [openDecoder] does, on a thread of the decoder, whose raised priority the runtime's threads inherit.
 *
 * When the caller is cancelled, reading files ends at once; a runtime that loads graphs is waited for, and they are closed.
 *
 * @param progress receives the files as they are checked, on the decoder's thread.
 * @throws InputError as [openDecoder].
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
    val workers = DecoderThreads()
    var opened: Decoder? = null
    try {
        return withContext(workers.dispatcher) {
            val watched = Progress { name, bytes ->
                ensureActive()
                progress.done(name, bytes)
            }
            openDecoder(bundle, loadGraphs, deviceFolder, device, threads, verify, digest, watched).also {
                it.workers = workers
                opened = it
            }
        }
    } catch (error: Throwable) { // also where it was opened, and the caller was cancelled meanwhile
        uncancelled(workers) { opened?.close() }
        workers.end()
        throw error
    }
}

/**
 * Run what blocks, such as [Conversation.save] and [Decoder.openSession], on a thread of the decoder.
 *
 * A caller that is cancelled waits for the end of [work], whose result is lost.
 */
public suspend fun <T> Decoder.onDecoder(work: () -> T): T = withContext(workers.dispatcher) { work() }

/** Close as [Decoder.close] does, also if the caller is cancelled; it waits without blocking the caller's thread. */
public suspend fun Decoder.closeAndJoin(): Unit = uncancelled(workers) { close() }

/** Two steps: to come back from another dispatcher is a place where a caller is cancelled. */
private suspend fun <T> uncancelled(workers: DecoderThreads, work: () -> T): T =
    withContext(NonCancellable) { withContext(workers.dispatcher) { work() } }

/** See [Stream.asFlow]. */
internal fun tokenFlow(stream: Stream, decoder: Decoder): Flow<Token> = flow {
    check(stream.collected.compareAndSet(false, true)) { "the text is collected already; begin another one" }
    coroutineScope {
        val watch = launch(start = CoroutineStart.UNDISPATCHED) {
            suspendCancellableCoroutine<Unit> { it.invokeOnCancellation { stream.cancel() } }
        }
        try {
            while (true) emit(decoder.onDecoder { if (stream.hasNext()) stream.next() else null } ?: break)
        } finally { // no pass of it runs
            watch.cancel()
            uncancelled(decoder.workers) { stream.leave() } // it may write costs
        }
    }
}

/**
 * Threads for coroutines that wait for a decoder: there are none before the first, and then as many as wait at once. One
 * alone would be held by a long prompt, which gives way to other conversations only where these have threads.
 */
internal class DecoderThreads {
    private val pool = ThreadPoolExecutor(0, Int.MAX_VALUE, IDLE_SECONDS, TimeUnit.SECONDS, SynchronousQueue()) { work ->
        Thread(work, "gemma-mtp-decoder").apply {
            isDaemon = true
            priority = PRIORITY
        }
    }
    val dispatcher: CoroutineDispatcher = pool.asCoroutineDispatcher()

    /** End them once they are idle. What comes later still runs, and finds the decoder closed; a refusal would cancel it. */
    fun end() = pool.setKeepAliveTime(1, TimeUnit.MILLISECONDS)
}
