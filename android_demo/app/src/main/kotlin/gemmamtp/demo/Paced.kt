package gemmamtp.demo

import java.util.concurrent.atomic.AtomicBoolean

/**
 * Calls [run] at most once in [millis], and always once more after the last request.
 *
 * @param now milliseconds of a clock that never goes back.
 * @param later runs a function after so many milliseconds, always on the same thread.
 */
class Paced(
    private val millis: Long,
    private val now: () -> Long,
    private val later: (Long, () -> Unit) -> Unit,
    private val run: () -> Unit,
) {
    private val waiting = AtomicBoolean()

    @Volatile
    private var next = 0L

    /** Ask for a run; any thread may call it. */
    fun request() {
        if (!waiting.compareAndSet(false, true)) return
        later(maxOf(0, next - now())) {
            waiting.set(false) // first, so that a request during the run is not lost
            next = now() + millis
            run()
        }
    }
}
