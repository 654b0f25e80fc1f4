package gemmamtp.core

import java.io.Closeable
import java.nio.Buffer
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.LongBuffer

/**
 * Numbers in direct memory of native byte order, which both runtimes take by address.
 *
 * @property data a FloatBuffer or a LongBuffer with exactly as many elements as [shape] says.
 */
class Tensor(val data: Buffer, vararg val shape: Long)

/** One loaded graph that reads, and in the target's case writes, the cache in the app's own memory. */
interface BoundGraph : Closeable {
    /** Use these cache buffers, by name, from now on; those that the graph does not name are left out. */
    fun bind(cache: Map<String, Tensor>)

    /**
     * Outputs that are not cache buffers, by name. They may lie in memory that the next run overwrites.
     *
     * @param inputs those that are not cache buffers, by name.
     * @throws InputError the graph cannot run, which no sound bundle's does.
     */
    fun run(inputs: Map<String, Tensor>): Map<String, Tensor>
}

/** What an [InputError]'s message is: one line that names the offender, what was expected, and what to do. */
class InputError(message: String, cause: Throwable? = null) : Exception(message, cause)

/** Zeros in direct memory. */
fun floats(count: Int): FloatBuffer = direct(count.toLong() * Float.SIZE_BYTES).asFloatBuffer()

/** Zeros in direct memory. */
fun longs(count: Int): LongBuffer = direct(count.toLong() * Long.SIZE_BYTES).asLongBuffer()

private fun direct(bytes: Long): ByteBuffer {
    check(bytes <= Int.MAX_VALUE) { "$bytes bytes are more than one buffer holds" }
    return ByteBuffer.allocateDirect(bytes.toInt()).order(ByteOrder.nativeOrder())
}
