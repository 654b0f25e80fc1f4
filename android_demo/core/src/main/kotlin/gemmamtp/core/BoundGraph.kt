@file:JvmName("Buffers")

package gemmamtp.core

import java.io.Closeable
import java.nio.Buffer
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.LongBuffer

/**
 * An array in direct memory of native byte order, which both runtimes take by address.
 *
 * @property data a FloatBuffer, a LongBuffer, or a ShortBuffer of float16, with as many elements as the [shape] has.
 */
public class Tensor(public val data: Buffer, public vararg val shape: Long)

/** A loaded graph that reads the KV cache in the app's memory; the target's graph writes it as well. */
public interface BoundGraph : Closeable {
    /**
     * Use these cache buffers from now on.
     *
     * If it fails, those that were used before stay in use.
     *
     * @param cache by name, of the manifest's layout and dtype. The graph reads and writes their memory in place, and ignores those that it
     *     does not name.
     * @throws InputError the runtime cannot use them.
     */
    public fun bind(cache: Map<String, Tensor>)

    /**
     * Run the graph, and return the outputs that are not cache buffers, by name. The next run may overwrite them.
     *
     * @param inputs those that are not cache buffers, by name; FORMAT.md has their shapes.
     * @throws InputError the graph cannot run; that of an intact bundle can.
     */
    public fun run(inputs: Map<String, Tensor>): Map<String, Tensor>
}

/**
 * Input that cannot be used.
 *
 * The message is one line that names the offender, what was expected, what was found and what to do. It is unchecked, so that
 * Java can catch it wherever it comes from.
 */
public class InputError @JvmOverloads constructor(message: String, cause: Throwable? = null) :
    RuntimeException(message, cause)

/** A buffer of [count] zeros in direct memory. */
public fun floats(count: Int): FloatBuffer = direct(count.toLong() * Float.SIZE_BYTES).asFloatBuffer()

/** A buffer of [count] zeros in direct memory. */
public fun longs(count: Int): LongBuffer = direct(count.toLong() * Long.SIZE_BYTES).asLongBuffer()

/** Zeros in direct memory of native byte order. */
internal fun direct(bytes: Long): ByteBuffer = ByteBuffer.allocateDirect(capacity(bytes)).order(ByteOrder.nativeOrder())

/** So many bytes, as the capacity of a buffer. */
internal fun capacity(bytes: Long): Int {
    check(bytes <= Int.MAX_VALUE) { "$bytes bytes are more than one buffer holds" }
    return bytes.toInt()
}
