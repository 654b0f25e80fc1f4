package gemmamtp.download

import gemmamtp.core.InputError
import gemmamtp.core.oneLine
import java.io.ByteArrayOutputStream
import java.io.Closeable
import java.io.InputStream
import java.io.InterruptedIOException
import java.net.SocketTimeoutException

/** Reading failed, for the moment: it may go better later. */
internal class Broken(message: String, cause: Throwable? = null) : Exception(message, cause)

/** What came cannot be the file. */
internal class OtherFile(message: String) : Exception(message)

/** Where the files of a bundle come from. */
internal interface Source {
    /** What errors call a file. */
    fun address(name: String): String

    /** What to do where a file is not what the manifest says. */
    val remedy: String

    /**
     * Run [work], and again while it throws [Broken] and there is hope.
     *
     * @param length how far the file is.
     * @throws InputError there is none.
     */
    fun insist(name: String, length: () -> Long, work: () -> Unit)

    /**
     * Begin to read a file.
     *
     * @param from its first byte that is wanted; the body may begin before.
     * @param size of the file in bytes; null if it is not known.
     * @throws Broken it cannot be read now.
     * @throws OtherFile it has another size, or is compressed.
     * @throws InputError it is not there.
     */
    fun open(name: String, from: Long = 0, size: Long? = null): Body
}

/**
 * Bytes of a file.
 *
 * @property begin the first one's place in the file.
 * @param announced how many there are, as far as the source said; null if it did not.
 * @param end ends reading, wherever it is: a connection is not kept, since there may be much left to read.
 */
internal class Body(
    private val stream: InputStream,
    val begin: Long,
    private val announced: Long?,
    private val end: () -> Unit,
) : Closeable {
    /** Read up to [most] bytes; returns how many, -1 at the end. */
    fun read(block: ByteArray, most: Int): Int = reading { stream.read(block, 0, most) }

    /** All of it, but at most [limit] bytes and one more. */
    fun readAll(limit: Int): ByteArray {
        val all = ByteArrayOutputStream()
        val block = ByteArray(1 shl 12)
        while (all.size() <= limit) {
            val bytes = read(block, minOf(block.size, limit + 1 - all.size()))
            if (bytes < 0) break
            all.write(block, 0, bytes)
        }
        if (announced != null && all.size() < minOf(announced, limit.toLong())) {
            throw Broken("ended after ${all.size()} of $announced bytes")
        }
        return all.toByteArray()
    }

    override fun close() = end()
}

/** Files that an app can read. */
internal class Local(private val files: BundleFiles) : Source {
    override val remedy get() = "copy the bundle again"

    override fun address(name: String): String = shown(name)

    override fun insist(name: String, length: () -> Long, work: () -> Unit) = try {
        work()
    } catch (error: Broken) {
        throw InputError("${address(name)}: cannot be read (${error.message}); what was copied is kept, try again", error)
    }

    override fun open(name: String, from: Long, size: Long?): Body {
        val stream = reading { files.open(name) }
            ?: throw InputError("${address(name)}: is missing; pick the folder that `export` wrote, or copy it again")
        try {
            return Body(stream, if (from > 0) reading { stream.skip(from) } else 0, null, stream::close)
        } catch (error: Broken) {
            stream.close()
            throw error
        }
    }
}

internal fun <T> reading(work: () -> T): T =
    try {
        work()
    } catch (error: InterruptedIOException) { // the app wants an end, unless the server is silent
        throw if (error is SocketTimeoutException) broken(error) else error
    } catch (error: Exception) { // not IOException alone: an address that the server sends to may be malformed
        throw broken(error)
    }

private fun broken(error: Exception) = Broken("${error.javaClass.simpleName}: ${shown(oneLine(error))}", error)
