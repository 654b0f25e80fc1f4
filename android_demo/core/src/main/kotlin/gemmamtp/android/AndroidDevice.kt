package gemmamtp.android

import android.content.Context
import android.os.Build
import android.os.PerformanceHintManager
import android.os.PowerManager
import android.os.Process
import android.os.SharedMemory
import android.system.ErrnoException
import gemmamtp.core.Device
import gemmamtp.core.capacity
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder

/** Heat changes slowly, and the system answers questions more frequent than once a second with no number. */
private const val HEAT_NANOSECONDS = 10_000_000_000L

/** Headrooms at which a step begins; at 1 the system slows the phone down severely. */
private val STEPS = listOf(0.7f, 0.85f, 1f)

/** How far below its beginning a step ends, so that a headroom at a boundary is no change each time. */
private const val HYSTERESIS = 0.05f

/**
 * The phone that the app runs on.
 *
 * Keys and values lie in shared memory, which does not count as the app's heap. From Android 11 on its heat is known. From
 * Android 12 on its scheduler knows of passes and how long they should take, namely no longer than the fastest before of the
 * same size (ADPF, android.os.PerformanceHintManager).
 *
 * Make one for each decoder, before its bundle is opened: threads that begin after that are taken as those of the runtime.
 *
 * @param clock nanoseconds, from any moment on.
 */
public class AndroidDevice internal constructor(context: Context, private val clock: () -> Long) : Device {
    public constructor(context: Context) : this(context, System::nanoTime)

    private val app = context.applicationContext // services of an activity would keep it
    private val power = app.getSystemService(PowerManager::class.java)
    private val hints = if (Build.VERSION.SDK_INT >= 31) app.getSystemService(PerformanceHintManager::class.java) else null
    private val others = threads()
    private var hinted = emptySet<Int>()
    private var session: PerformanceHintManager.Session? = null
    private var target = 0L // of the session
    private val fastest = HashMap<Pair<String, Int>, Long>()
    private var asked = clock() - HEAT_NANOSECONDS
    private var step = 0

    override val heat: Int
        @Synchronized get() {
            if (Build.VERSION.SDK_INT < 30 || clock() - asked < HEAT_NANOSECONDS) return step
            asked = clock()
            step = step(power.getThermalHeadroom(0), step)
            return step
        }

    override fun allocate(bytes: Long): ByteBuffer {
        if (bytes == 0L) return super.allocate(bytes) // shared memory has at least a byte
        try {
            return SharedMemory.create("gemma-mtp", capacity(bytes)).use { it.mapReadWrite() }.order(ByteOrder.nativeOrder())
        } catch (error: ErrnoException) {
            throw OutOfMemoryError("$bytes bytes of shared memory cannot be had (${error.message})").apply { initCause(error) }
        }
    }

    @Synchronized
    override fun passed(graph: String, tokens: Int, nanoseconds: Long) {
        if (Build.VERSION.SDK_INT < 31 || hints == null || nanoseconds <= 0) return
        val best = minOf(fastest[graph to tokens] ?: nanoseconds, nanoseconds)
        fastest[graph to tokens] = best
        if (Process.myTid() !in hinted) begin(hints, best)
        // One target for passes of all sizes: the system drops what is reported soon after a target was changed.
        session?.reportActualWorkDuration((nanoseconds.toDouble() / best * target).toLong())
    }

    /** Begin a session of this thread and the runtime's; there is none on phones that do not take hints. */
    private fun begin(hints: PerformanceHintManager, best: Long) {
        session?.close()
        target = best
        val alive = threads()
        hinted = hinted.intersect(alive) + (alive - others) + Process.myTid()
        session = try {
            hints.createHintSession(hinted.toIntArray(), target)
        } catch (_: RuntimeException) { // one of them has ended meanwhile: the next thread tries again
            null
        }
    }
}

/** The step of a headroom, after another step; not a number tells nothing. */
internal fun step(headroom: Float, last: Int): Int {
    if (headroom.isNaN()) return last
    val reached = STEPS.count { headroom >= it }
    return maxOf(reached, minOf(last, STEPS.count { headroom >= it - HYSTERESIS }))
}

/** Ids of this process's threads. */
private fun threads(): Set<Int> = File("/proc/self/task").list().orEmpty().mapNotNull { it.toIntOrNull() }.toSet()
