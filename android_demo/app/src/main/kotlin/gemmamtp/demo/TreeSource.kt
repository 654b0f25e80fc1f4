package gemmamtp.demo

import android.content.ContentResolver
import android.content.Intent
import android.net.Uri
import android.provider.DocumentsContract
import android.provider.DocumentsContract.Document
import java.io.IOException
import java.io.InputStream

/** A folder from the system's picker; the permission to read it is held until it is closed. */
class TreeSource(private val resolver: ContentResolver, private val tree: Uri) : BundleSource {
    private val id = DocumentsContract.getTreeDocumentId(tree)

    init {
        try { // else the permission ends with the activity, and copying may take longer
            resolver.takePersistableUriPermission(tree, Intent.FLAG_GRANT_READ_URI_PERMISSION)
        } catch (_: SecurityException) {
            // the provider gives no permission that lasts
        }
    }

    override val name: String by lazy {
        val folder = DocumentsContract.buildDocumentUriUsingTree(tree, id)
        val names = rows(folder, Document.COLUMN_DISPLAY_NAME) { it[0] }
        names.firstOrNull() ?: throw IOException("the folder has no name")
    }

    /** Documents of the folder's files by their names. */
    private val files: Map<String?, String?> by lazy {
        val children = DocumentsContract.buildChildDocumentsUriUsingTree(tree, id)
        rows(children, Document.COLUMN_DISPLAY_NAME, Document.COLUMN_DOCUMENT_ID) { (name, document) -> name to document }.toMap()
    }

    override fun open(name: String): InputStream? {
        val document = files[name] ?: return null
        val file = DocumentsContract.buildDocumentUriUsingTree(tree, document)
        return resolver.openInputStream(file) ?: throw IOException("the folder's app does not give $file")
    }

    override fun close() {
        try {
            resolver.releasePersistableUriPermission(tree, Intent.FLAG_GRANT_READ_URI_PERMISSION)
        } catch (_: SecurityException) {
            // there was none
        }
    }

    private fun <T> rows(uri: Uri, vararg columns: String, row: (List<String?>) -> T): List<T> = asIO {
        val cursor = resolver.query(uri, columns, null, null, null)
            ?: throw IOException("the folder's app does not answer")
        cursor.use { List(it.count) { at -> it.moveToPosition(at); row(columns.indices.map(it::getString)) } }
    }

    /** Providers are other apps, which may throw anything. */
    private fun <T> asIO(ask: () -> T): T = try {
        ask()
    } catch (error: RuntimeException) {
        throw IOException(error.message ?: error.javaClass.simpleName, error)
    }
}
