package gemmamtp.core

import java.util.concurrent.Callable
import java.util.concurrent.CountDownLatch
import java.util.concurrent.ExecutionException
import java.util.concurrent.FutureTask
import kotlin.test.assertFailsWith

/** Work of another thread. */
internal class Other<T>(name: String, work: () -> T) {
    private val task = FutureTask(Callable { work() })
    private val thread = Thread(task, name).apply { start() }

    /** Wait until it waits for somebody. */
    fun waits() {
        while (thread.state != Thread.State.WAITING) {
            check(thread.state != Thread.State.TERMINATED) { "it has ended" }
            Thread.yield()
        }
    }

    fun result(): T = task.get()

    fun error(): Throwable = assertFailsWith<ExecutionException> { task.get() }.cause!!
}

/** Holds a graph's next pass until it may go on. */
internal class Held(graph: FakeGraph) {
    private val began = CountDownLatch(1)
    private val mayEnd = CountDownLatch(1)

    init {
        graph.inPass = {
            began.countDown()
            mayEnd.await()
        }
    }

    fun begins() = began.await()

    fun go() = mayEnd.countDown()
}
