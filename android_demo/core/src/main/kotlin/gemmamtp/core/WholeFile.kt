package gemmamtp.core

import java.io.File
import java.io.FileOutputStream
import java.io.IOException

/**
 * Write a file whole or not at all: to another name first, then renamed.
 *
 * @throws IOException it cannot be written, for instance for lack of room; a file that was there is as it was.
 */
@Throws(IOException::class)
internal fun writeWhole(file: File, write: (FileOutputStream) -> Unit) {
    val target = file.canonicalFile
    val aside = File.createTempFile(".${target.name}.partial-", "", target.parentFile)
    try {
        FileOutputStream(aside).use {
            write(it)
            it.fd.sync() // else it may be empty after the battery fails
        }
        if (!aside.renameTo(target)) throw IOException("cannot be replaced")
    } catch (error: Throwable) {
        aside.delete()
        throw error
    }
}
