package gemmamtp.android

import android.content.Context
import android.os.Build
import android.os.Process
import android.os.SharedMemory
import java.io.File
import java.nio.ByteOrder
import java.util.concurrent.CountDownLatch
import kotlin.concurrent.thread
import kotlin.test.AfterTest
import kotlin.test.BeforeTest
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

/** On stand-ins of Android's classes. */
class AndroidDeviceTest {
    private val context = Context()
    private var now = 0L

    @BeforeTest
    fun newest() {
        Build.VERSION.SDK_INT = 36
        Process.tid = 7
    }

    @AfterTest
    fun enough() {
        SharedMemory.left = Int.MAX_VALUE
    }

    private fun device() = AndroidDevice(context) { now }

    @Test
    fun memoryIsSharedInNativeOrderAndItsFilesAreClosed() {
        val memory = device().allocate(1000)
        assertEquals(1000 to ByteOrder.nativeOrder(), memory.capacity() to memory.order())
        assertTrue(memory.isDirect)
        assertEquals(0, device().allocate(0).capacity())
        assertEquals(0, SharedMemory.open)
        SharedMemory.left = 999
        assertTrue("1000 bytes of shared memory" in assertFailsWith<OutOfMemoryError> { device().allocate(1000) }.message!!)
    }

    @Test
    fun passesAreHintedAndShouldTakeNoLongerThanTheFastestOfTheirSize() {
        val device = device()
        for ((tokens, time) in listOf(1 to 50L, 1 to 40L, 5 to 90L, 1 to 45L)) device.passed("target", tokens, time)
        device.passed("drafter", 1, 9)
        val session = context.hints.sessions.single()
        assertEquals(50, session.target)
        assertEquals(listOf<Long>(50, 50, 50, 56, 50), session.actual) // in proportion: 45 is an eighth more than 40
        assertTrue(7 in session.tids)
    }

    @Test
    fun aSessionThatCannotBeHadIsNone() {
        context.hints.failure = SecurityException("a thread is not of this process")
        val device = device()
        device.passed("target", 1, 5)
        context.hints.failure = null
        Process.tid = 8
        repeat(2) { device.passed("target", 1, 5) }
        assertEquals(listOf(2), context.hints.sessions.map { it.actual.size })
    }

    @Test
    fun threadsThatBeganSinceAreHintedAsWell() {
        val device = device()
        val (begun, end) = List(2) { CountDownLatch(1) }
        val pool = thread {
            begun.countDown()
            end.await()
        }
        begun.await()
        device.passed("target", 1, 5)
        val all = File("/proc/self/task").list()!!.size
        end.countDown()
        pool.join()
        val hinted = context.hints.sessions.single().tids.size
        assertTrue(hinted in 2 until all, "$hinted of $all")
        Process.tid = 8 // the app decodes on another thread
        device.passed("target", 1, 5)
        assertEquals(listOf(true, false), context.hints.sessions.map { it.closed })
        assertTrue(8 in context.hints.sessions[1].tids)
    }

    @Test
    fun heatIsAskedForRarelyAndChangesInSteps() {
        val device = device()
        val steps = ArrayList<Int>()
        for (headroom in listOf(0.5f, 0.71f, 0.66f, 0.64f, 0.9f, Float.NaN, 1.2f, 0.97f, 0.3f)) {
            context.power.headroom = headroom
            repeat(3) { device.heat }
            steps.add(device.heat)
            now += 10_000_000_000
        }
        assertEquals(listOf(0, 1, 1, 0, 2, 2, 3, 3, 0), steps)
        assertEquals(steps.size, context.power.asked)
    }

    @Test
    fun olderPhonesGiveNeither() {
        context.power.headroom = 2f
        Build.VERSION.SDK_INT = 30
        assertEquals(3, device().heat)
        Build.VERSION.SDK_INT = 29
        val device = device()
        device.passed("target", 1, 5)
        assertEquals(0 to 0, device.heat to context.hints.sessions.size)
    }
}
